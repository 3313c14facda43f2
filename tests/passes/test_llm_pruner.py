"""LLM-Pruner: its importance against a slow reference, and which channels and heads of a model go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from support.command_line import sparsify as sparsify_command
from support.folders import load
from torch import Tensor, nn

import sparsify
from sparsify.errors import PatternError, SpecError
from sparsify.method.pattern import NM, Unstructured
from sparsify.method.spec import parse_pass, spec_text
from sparsify.method.structural_pass import Part
from sparsify.passes import LLMPruner

IMPORTANCES = ("taylor-first", "taylor-second", "taylor-mix", "taylor-vector", "l1", "l2")
GROUPS = ("sum", "mean", "max", "product", "first", "last")


def slow_scores(parts: list[Part], channels: int, importance: str, group: str) -> list[float]:
    """algorithms.md, section 9.2, weight by weight: over the parameters at each place, then over a channel's places."""
    every: list[list[list[float]]] = []
    for part in parts:
        of_part = [[0.0] * part.places for _ in range(channels)]
        for row in range(part.weight.shape[0]):
            signed = whole = 0.0
            for column in range(part.weight.shape[1]):
                w = float(part.weight[row, column])
                g, f = (0.0 if t is None else float(t[row, column]) for t in (part.gradient, part.fisher))
                value = {
                    "l1": abs(w),
                    "l2": w * w,
                    "taylor-second": w * f * w,
                    "taylor-mix": w * g - w * f * w / 2,
                }.get(importance, w * g)
                signed, whole = signed + value, whole + abs(value)
            of_part[int(part.channel[row])][int(part.place[row])] += (
                abs(signed) if importance == "taylor-vector" else whole
            )
        every.append(of_part)
    combined = []
    for channel in range(channels):
        total = 0.0
        for place in range(parts[0].places):
            scores = [of_part[channel][place] for of_part in every]
            product = 1.0
            for score in scores:
                product *= score
            total += {
                "sum": sum(scores),
                "mean": sum(scores) / len(scores),
                "max": max(scores),
                "product": product,
                "first": scores[0],
                "last": scores[-1],
            }[group]
        combined.append(total ** (1 / len(parts)) if group == "product" else total)
    return combined


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("places", [1, 2])
def test_scores_against_the_slow_reference(places: int, importance: Any, group: Any) -> None:
    torch.manual_seed(0)
    owner = LLMPruner(Unstructured(0.5), importance=importance, group=group)
    parts = [
        Part(
            torch.randn(rows, 5),
            torch.randn(rows, 5),
            torch.rand(rows, 5),
            torch.arange(rows) * 4 // rows,
            torch.arange(rows) % places,
            places,
        )
        for rows in (16, 8, 8, 24)
    ]
    got = owner.scores(parts, 4, 0)
    wanted = torch.tensor(slow_scores(parts, 4, importance, group), dtype=torch.float64)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-9)


def test_products_of_many_small_numbers_keep_their_order() -> None:
    """A width has hundreds of parameters: their product is 0 in floating point, and the order of the least is told."""
    owner = LLMPruner(Unstructured(0.5), importance="l1", group="product")
    zeros, channel = torch.zeros(4, dtype=torch.long), torch.arange(4)
    parts = [Part(torch.tensor([[4e-9], [1e-9], [3e-9], [2.0]]), None, None, channel, zeros, 1) for _ in range(300)]
    assert owner.scores(parts, 4, 0).argsort().tolist() == [1, 2, 0, 3]


def official_heads(worth: list[Tensor], heads: int, group: str) -> Tensor:
    """TaylorImportance and the ranking of whole heads of the official code, of vectors over all columns; query heads
    are added to the key-value head that serves them."""
    columns = min(len(vector) for vector in worth)
    own = torch.stack([v.view(heads, -1, columns // heads).sum(1).flatten() for v in worth])
    combined = {
        "sum": own.sum(0),
        "mean": own.mean(0),
        "max": own.max(dim=0)[0],
        "product": torch.prod(own, dim=0),
        "first": own[0],
        "last": own[-1],
    }[group]
    return combined.view(heads, -1).sum(1)


@pytest.mark.first(4)
@pytest.mark.parametrize("key_value", [6, 3])
@pytest.mark.parametrize("group", GROUPS)
def test_the_heads_that_go_are_those_of_the_official_code(group: str, key_value: int) -> None:
    """Six heads; with three key-value heads too. The parameters come in the graph's order."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=key_value, **sizes)
    model = transformers.LlamaForCausalLM(config)
    made = sparsify.compile(model, [f"llm-pruner:34%,importance=l1,group={group}"])
    for number, layer in enumerate(model.model.layers):
        own = layer.self_attn
        rows = [p.weight.detach().double().abs().sum(1) for p in (own.q_proj, own.k_proj, own.v_proj)]
        scores = official_heads([*rows, own.o_proj.weight.detach().double().abs().sum(0)], key_value, group)
        (cut,) = (c for c in made.structure[0].cuts if c.kind == "heads" and f"layers.{number}." in c.name)
        assert list(cut.removed) == sorted(scores.argsort()[: key_value // 3].tolist())


def test_random_is_seeded() -> None:
    owner = LLMPruner(Unstructured(0.5), importance="random")
    assert torch.equal(owner.scores([], 9, 3), owner.scores([], 9, 3))
    assert not torch.equal(owner.scores([], 9, 3), owner.scores([], 9, 4)) and not owner.needs_data


def test_specs_and_options() -> None:
    for text in (
        "llm-pruner:25%",
        "llm-pruner:20%,importance=l2,group=max",
        "llm-pruner:50%,granularity=channel,round=16",
    ):
        assert spec_text(parse_pass(text)) == text and parse_pass(spec_text(parse_pass(text))) == parse_pass(text)
    for text in ("llm-pruner:2:4", "llm-pruner:25%,round=0", "llm-pruner:25%,importance=magic", "llm-pruner"):
        with pytest.raises(SpecError):
            parse_pass(text)
    for text in ("llm-pruner:0%", "llm-pruner:100%", "llm-pruner:130%"):
        with pytest.raises(PatternError):
            parse_pass(text)
    with pytest.raises(SpecError, match="share of channels"):
        LLMPruner(NM(2, 4))


@pytest.mark.parametrize(
    ("ratio", "free", "kind", "left"),
    [
        (0.25, 64, "channels", 48),
        (0.25, 11008, "channels", 8256),
        (0.2, 11008, "channels", 8800),
        (0.5, 10, "channels", 8),
        (0.25, 172, "channels", 128),
        (0.25, 60, "experts", 45),
        (0.25, 4, "heads", 3),
        (0.2, 4, "heads", 3),
        (0.5, 32, "heads", 16),
        (0.6, 4, "heads", 2),
    ],
)
def test_how_many_stay(ratio: float, free: int, kind: str, left: int) -> None:
    assert LLMPruner(Unstructured(ratio)).left(free, kind) == left


@pytest.mark.parametrize("free", [10, 16, 17, 20, 43, 64, 100, 172, 2730, 11008])
@pytest.mark.parametrize("unit", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("ratio", ["0.1", "0.2", "0.25", "0.5", "0.9"])
def test_round_is_met_or_refused(ratio: str, unit: int, free: int) -> None:
    """Whatever the width was; and at most one multiple beside what was asked for."""
    owner = LLMPruner(Unstructured(ratio), round=unit)
    for kind in ("channels", "width", "experts"):
        exact = free * (1 - float(ratio))
        try:
            left = owner.left(free, kind)
        except SpecError as error:
            assert exact < unit, error
        else:
            assert left % unit == 0 and 0 < left < free and abs(left - exact) < unit


def test_nothing_would_be_left_or_all() -> None:
    with pytest.raises(SpecError, match="none would be left"):
        LLMPruner(Unstructured(0.95)).left(64, "channels")
    with pytest.raises(SpecError, match=r"of 4 heads in multiples of 1 all would be left\. Ask for more"):
        LLMPruner(Unstructured(0.1)).left(4, "heads")


def gradients(folder: Path, ids: Tensor) -> dict[str, Tensor]:
    """Mean over sequences of the gradient of each one's loss, by autograd on the whole model."""
    model = load(folder)
    found: dict[str, Tensor] = {}
    for row in ids:
        model.zero_grad()
        logits = model(row[None]).logits[0, :-1].float()
        nn.functional.cross_entropy(logits, row[1:]).backward()
        for name, parameter in model.named_parameters():
            found[name] = found.get(name, 0) + parameter.grad / len(ids)
    return found


def test_the_least_important_go(folder: Callable[[str], Path], tmp_path: Path, ids: Tensor) -> None:
    """Which channels and heads of a Llama: by gradients of the whole model, and sums written out."""
    dense = folder("llama")
    result = sparsify.compile(dense, ["llm-pruner:50%"], calibration=[ids], output=tmp_path / "out")
    model, g = load(dense), gradients(dense, ids)
    worth = {n: (p.detach() * g[n]).abs() for n, p in model.named_parameters()}
    for i in range(2):
        mlp, attention = f"model.layers.{i}.mlp.", f"model.layers.{i}.self_attn."
        channels = (worth[mlp + "gate_proj.weight"] + worth[mlp + "up_proj.weight"]).sum(1)
        channels += worth[mlp + "down_proj.weight"].sum(0)
        # Two key-value heads of eight columns, two query heads each.
        heads = worth[attention + "q_proj.weight"].view(2, -1).sum(1) + worth[attention + "k_proj.weight"].view(
            2, -1
        ).sum(1)
        heads += worth[attention + "v_proj.weight"].view(2, -1).sum(1)
        heads += worth[attention + "o_proj.weight"].sum(0).view(2, -1).sum(1)
        cuts = {c.name.rpartition(".")[2]: c for c in result.structure[0].cuts if f"layers.{i}." in c.name}
        assert list(cuts["down_proj"].removed) == sorted(channels.argsort()[:32].tolist())
        assert list(cuts["o_proj"].removed) == [int(heads.argmin())]
    small = load(tmp_path / "out")
    assert small.config.intermediate_size == 32 and small.config.num_key_value_heads == 1 and small.config.head_dim == 8
    kept = [c for c in range(64) if c not in cuts["down_proj"].removed]
    assert torch.equal(small.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight[kept])


def test_channels_of_a_model_with_tied_embeddings(tmp_path: Path, ids: Tensor) -> None:
    """The embedding is the head too: its gradient is that of both uses, and it is counted once."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    spec = "llm-pruner:25%,granularity=channel"
    result = sparsify.compile(tmp_path / "dense", [spec], calibration=[ids], output=tmp_path / "out")
    model, g = load(tmp_path / "dense"), gradients(tmp_path / "dense", ids)
    total = torch.zeros(32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            total += (parameter.detach() * g[name]).abs().sum(axis)
    (cut,) = result.structure[0].cuts
    assert list(cut.removed) == sorted(total.argsort()[:8].tolist())
    small = load(tmp_path / "out")
    assert small.config.hidden_size == 24 and small.lm_head.weight is small.model.embed_tokens.weight


def test_at_the_command_line(folder: Callable[[str], Path], tmp_path: Path) -> None:
    dense = folder("llama")
    words = ("compile", dense, "--pass", "llm-pruner:50%,importance=l2")
    dry = sparsify_command(*words, "--dry-run").stdout
    assert "heads 2 → 1 (×2), channels 64 → 32 (×2)" in dry and "nothing was read" in dry
    done = sparsify_command(*words, "-o", tmp_path / "out").stdout
    assert "heads 2 → 1 (×2), channels 64 → 32 (×2); parameters 22,688 → 13,472 (0.594×)" in done
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        {p.name for p in dense.iterdir()} | {"sparsify.json", "README.md"}
    )


class Seen(NamedTuple):
    gradient: Tensor
    fisher: Tensor


def test_gradients_and_fisher_are_means_over_the_samples(folder: Callable[[str], Path], ids: Tensor) -> None:
    """What a structural pass is shown, of a model and four sequences: by autograd, one sequence at a time."""
    seen: list[Part] = []

    class Watching(LLMPruner):
        def scores(self, parts: Sequence[Part], channels: int, seed: int) -> Tensor:
            seen.extend(parts)
            return super().scores(parts, channels, seed)

    sparsify.compile(folder("llama"), [Watching(Unstructured("0.5"), importance="taylor-mix")], calibration=[ids])
    model, every = load(folder("llama")), dict[str, list[Tensor]]()
    for row in ids:
        model.zero_grad()
        logits = model(row[None]).logits[0, :-1]
        nn.functional.cross_entropy(logits, row[1:]).backward()
        for name, parameter in model.named_parameters():
            every.setdefault(name, []).append(parameter.grad.clone())
    checked = 0
    for name, parameter in model.named_parameters():
        for part in seen:
            for turned in (False, True):
                own = parameter.detach().t() if turned and parameter.dim() == 2 else parameter.detach()
                if own.shape == part.weight.shape and torch.equal(own, part.weight):
                    exact = Seen(sum(every[name]) / 4, sum(g.square() for g in every[name]) / 4)  # type: ignore[arg-type]
                    for found, value in zip((part.gradient, part.fisher), exact, strict=True):
                        assert found is not None
                        value = value.t() if turned else value
                        torch.testing.assert_close(found, value, rtol=2e-3, atol=2e-4 * float(value.abs().max()))
                    checked += 1
    assert checked >= 14


@pytest.mark.parametrize("importance", ["taylor-mix", "taylor-second", "taylor-vector"])
def test_the_least_important_go_by_other_importances(
    importance: str, folder: Callable[[str], Path], ids: Tensor
) -> None:
    """Over several samples, end to end: the channels of the first block's mlp, by gradients of the whole model."""
    result = sparsify.compile(folder("llama"), [f"llm-pruner:50%,importance={importance}"], calibration=[ids])
    model, every = load(folder("llama")), dict[str, list[Tensor]]()
    with torch.enable_grad():
        for row in ids:
            model.zero_grad()
            nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).backward()
            for name, parameter in model.named_parameters():
                every.setdefault(name, []).append(parameter.grad.clone())
    total = torch.zeros(64)
    for part, axis in (("gate", 1), ("up", 1), ("down", 0)):
        name = f"model.layers.0.mlp.{part}_proj.weight"
        w = model.get_parameter(name).detach()
        g = torch.stack(every[name]).mean(0)
        f = torch.stack(every[name]).square().mean(0)
        if importance == "taylor-vector":
            total += (w * g).sum(axis).abs()
        else:
            total += {"taylor-mix": w * g - w * f * w / 2, "taylor-second": w * f * w}[importance].abs().sum(axis)
    cuts = {c.name.rpartition(".")[2]: c for c in result.structure[0].cuts if "layers.0." in c.name}
    assert list(cuts["down_proj"].removed) == sorted(total.argsort()[:32].tolist())


def narrow(place: Path) -> Path:
    """A Llama of 20 channels, which are no multiple of 8."""
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 3}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).save_pretrained(place)
    return place


@pytest.mark.slow
def test_a_smaller_model_can_be_pruned_to_a_pattern(tmp_path: Path) -> None:
    """Whatever the widths were: what is left of them fits 2:4, unless another round is asked for."""
    model = narrow(tmp_path / "model")
    made = sparsify.compile(model, ["llm-pruner:25%,importance=l1", "magnitude:2:4"])
    assert not [s for s in made.runs[0].skipped if "not a multiple" in s.reason]
    assert made.source.config.intermediate_size == 8 and len(made.runs[0].sites) == 21
    other = sparsify.compile(model, ["llm-pruner:25%,importance=l1,round=1", "magnitude:2:4"])
    hints = [s.reason for s in other.runs[0].skipped if "in_features 15 is not a multiple of 4" in s.reason]
    assert hints and all("round=4 of the pass that makes it smaller" in reason for reason in hints)


def test_layers_of_different_widths_are_rounded_too(tmp_path: Path) -> None:
    made = sparsify.compile(narrow(tmp_path / "model"), ["llm-pruner:30%,importance=l1,scope=global,round=4"])
    left = {c.after for c in made.structure[0].cuts if c.kind == "channels"}
    assert left and all(after % 4 == 0 for after in left)
