"""Blocks fitted to the dense model's: against the recipe written out, the guard, and all that stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, patch

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.families import FAMILIES, GQA, build, inputs, save
from support.folders import load, same_files
from torch import Tensor

import sparsify
from sparsify.compiler import stages
from sparsify.context import RegionResult
from sparsify.data.batches import load_calibration
from sparsify.errors import CalibrationError, SpecError, TraceError
from sparsify.frontend.source import open_source
from sparsify.passes import Refine

ROWS, LENGTH = 32, 12
RECIPE = "refine:epochs=2,rate=0.02"


def text(seed: int = 0, rows: int = ROWS, vocabulary: int = 60) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, vocabulary, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in ids.split(2)]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def compiled(source: Path, out: Path, *passes: str, **options: Any) -> Any:
    data = load_calibration(text(), open_source(source), rows=2)
    return sparsify.compile(source, passes, calibration=data, output=out, device="cpu", **options)


def reference(dense: Any, pruned: Any, batches: list[dict[str, Tensor]], epochs: int, rate: float) -> dict[str, Tensor]:
    """The recipe on the first block of a Llama, by transformers' own layers and plain autograd."""
    train = [b["input_ids"] for i, b in enumerate(batches) if i not in (4, 12)]
    rope = dense.model.rotary_emb
    layer, want = pruned.model.layers[0], dense.model.layers[0]

    def give(block: Any, model: Any, ids: Tensor) -> Tensor:
        hidden = model.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        out = block(hidden, attention_mask=mask, position_embeddings=rope(hidden, positions), position_ids=positions)
        return out[0] if isinstance(out, tuple) else out

    named = dict(layer.named_parameters())
    kept = {n: p.detach() != 0 if p.dim() == 2 else torch.ones_like(p, dtype=torch.bool) for n, p in named.items()}
    sizes = {n: float(p.detach()[kept[n]].square().mean().sqrt()) for n, p in named.items()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in named.items()}
    order, each = torch.Generator().manual_seed(0), -(-len(train) // 2)
    steps, step = epochs * each, 0
    warm = max(1, round(0.1 * steps))
    for _ in range(epochs):
        shuffled = torch.randperm(len(train), generator=order).tolist()
        for first in range(0, len(train), 2):
            chosen = shuffled[first : first + 2]
            layer.zero_grad()
            for at in chosen:
                with torch.no_grad():
                    target = give(want, dense, train[at])
                off = (give(layer, pruned, train[at]) - target).square().sum(-1) / target.square().sum(-1)
                (off.mean() / len(chosen)).backward()
            share = (
                (step + 1) / warm
                if step < warm
                else 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warm) / (steps - warm)))).item()
            )
            step += 1
            with torch.no_grad():
                for name, p in named.items():
                    assert p.grad is not None
                    grad, (m, v) = p.grad * kept[name], moments[name]
                    m.mul_(0.9).add_(0.1 * grad)
                    v.mul_(0.95).add_(0.05 * grad.square())
                    unbiased = (v / (1 - 0.95**step)).sqrt() + 1e-8
                    p -= rate * share * sizes[name] * (m / (1 - 0.9**step)) / unbiased
    return {f"model.layers.0.{n}": p.detach() for n, p in named.items()}


def test_a_block_becomes_what_the_recipe_says(tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    compiled(dense, tmp_path / "wanda", "wanda:2:4")
    result = compiled(dense, tmp_path / "out", "wanda:2:4", RECIPE)
    first = result.runs[1].regions[0]
    assert first.rate == 0.02 and first.after < first.before
    want = reference(load(dense), load(tmp_path / "wanda"), text(), 2, 0.02)
    got = tensors(tmp_path / "out")
    for name, value in want.items():
        assert torch.allclose(got[name], value, atol=2e-5), (name, float((got[name] - value).abs().max()))


@pytest.mark.first(2)
@pytest.mark.parametrize("spec", ["twin:2:4", "wanda:50%", "sparsegpt:2:4", "magnitude:50%"])
def test_zeros_stay_and_what_is_in_no_block_is_identical(spec: str, tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    compiled(dense, tmp_path / "pruned", spec)
    result = compiled(dense, tmp_path / "out", spec, RECIPE)
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "out")
    moved = 0
    for name, value in before.items():
        if ".layers." not in name and name != "model.norm.weight":
            assert torch.equal(value, after[name]), name
        if value.dim() == 2:
            assert torch.equal(value == 0, after[name] == 0), name
        moved += not torch.equal(value, after[name])
    assert moved > 5
    (regions,) = [run.regions for run in result.runs if run.regions]
    assert [region.loss for region in regions] == ["error", "kl"]
    said = json.loads((tmp_path / "out" / "sparsify.json").read_text())["passes"][1]
    assert said["spec"] == RECIPE and [r["after"] for r in said["regions"]] == [r.after for r in regions]


def test_a_region_that_gains_nothing_is_as_it_was_to_the_bit(tmp_path: Path) -> None:
    """Steps nearly as large as the weights themselves, which nothing can gain by."""
    dense = save("llama", tmp_path / "dense")
    compiled(dense, tmp_path / "pruned", "twin:2:4")
    result = compiled(dense, tmp_path / "out", "twin:2:4", "refine:epochs=1,rate=0.99")
    assert all(region.rate is None and region.after == region.before for region in result.runs[1].regions)
    assert same_files(tmp_path / "pruned", tmp_path / "out")


@pytest.mark.slow
def test_the_rate_is_the_best_of_a_ladder(tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    afters = {}
    for rate in ("auto", *Refine().ladder):
        result = compiled(dense, tmp_path / str(rate), "twin:2:4", f"refine:epochs=1,rate={rate}")
        afters[rate] = result.runs[1].regions[0]
    best = min((r for r in afters.values() if r is not afters["auto"]), key=lambda r: r.after)
    assert (afters["auto"].after, afters["auto"].rate) == (best.after, best.rate)


@pytest.mark.first(1)
@pytest.mark.parametrize("spec", ["wanda:2:4", "wanda:70%"])
def test_all_epochs_are_trained_at_the_largest_rate_that_gained_almost_as_much_as_the_best(
    spec: str, tmp_path: Path
) -> None:
    dense = save("llama", tmp_path / "dense")

    def first(name: str) -> RegionResult:
        return compiled(dense, tmp_path / name, spec, name).runs[1].regions[0]

    found, once = first("refine:epochs=4"), {r: first(f"refine:epochs=1,rate={r}") for r in Refine().ladder}
    gains = {rate: one.before - one.after for rate, one in once.items() if one.rate is not None}
    taken = max(rate for rate, gain in gains.items() if gain >= 0.75 * max(gains.values()))
    long = first(f"refine:epochs=4,rate={taken}")
    best = min((*once.values(), long), key=lambda one: one.after)
    assert (found.after, found.rate) == (best.after, best.rate)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    for name in ("one", "two"):
        compiled(dense, tmp_path / name, "wanda:2:4", RECIPE)
    assert same_files(tmp_path / "one", tmp_path / "two")
    compiled(dense, tmp_path / "other", "wanda:2:4", RECIPE, seed=1)
    assert not same_files(tmp_path / "one", tmp_path / "other")


def test_a_folder_that_was_pruned_earlier_learns_from_the_dense_one(tmp_path: Path) -> None:
    """In one command or in two: the same bytes."""
    dense = save("llama", tmp_path / "dense")
    compiled(dense, tmp_path / "pruned", "wanda:2:4")
    compiled(dense, tmp_path / "one", "wanda:2:4", RECIPE)
    compiled(tmp_path / "pruned", tmp_path / "two", RECIPE, teacher=dense)
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_a_teacher_with_the_same_weights_is_refused(tmp_path: Path) -> None:
    compiled(save("llama", tmp_path / "dense"), tmp_path / "pruned", "wanda:2:4")
    with pytest.raises(SpecError, match="the very weights that are refined: nothing to learn"):
        compiled(tmp_path / "pruned", tmp_path / "out", RECIPE, teacher=tmp_path / "pruned")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SpecError, match="an empty name"):
        compiled(tmp_path / "pruned", tmp_path / "out", RECIPE, teacher="")


def test_padding_teaches_nothing(tmp_path: Path) -> None:
    """What stands on padding is another text; the weights come out the same."""
    dense = save("llama", tmp_path / "dense")
    found = []
    for filler in (5, 50):
        batches = []
        for batch in text():
            ids, mask = batch["input_ids"].clone(), torch.ones_like(batch["input_ids"])
            ids[0, -4:], mask[0, -4:] = filler, 0
            batches.append({"input_ids": ids, "attention_mask": mask})
        out = tmp_path / str(filler)
        sparsify.compile(dense, ["magnitude:2:4", RECIPE], calibration=batches, output=out, device="cpu")
        found.append(tensors(out))
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


def test_bfloat16_is_trained_in_float32_and_rounded_once(tmp_path: Path) -> None:
    """A step of a thousandth of a weight is less than bfloat16 can say; many of them are more."""
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    result = compiled(tmp_path / "dense", tmp_path / "out", "wanda:2:4", "refine:epochs=6,rate=0.002",
                      compute_dtype="float32")  # fmt: skip
    compiled(tmp_path / "dense", tmp_path / "pruned", "wanda:2:4", compute_dtype="float32")
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "out")
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    assert all(region.after < region.before for region in result.runs[1].regions)
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((before[name] != after[name]).float().mean()) > 0.1


def test_experts_that_saw_few_tokens_stay(tmp_path: Path) -> None:
    config = hf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=1)
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            # What lies between two is never the greater of them.
            layer.mlp.gate.weight[2:] = layer.mlp.gate.weight[:2].mean(0)
    model.save_pretrained(tmp_path / "dense")
    compiled(tmp_path / "dense", tmp_path / "pruned", "magnitude:2:4")
    compiled(tmp_path / "dense", tmp_path / "out", "magnitude:2:4", "refine:epochs=1,rate=0.01,last=error")
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "out")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    experts = {int(n.split("experts.")[1][0]) for n in moved if "experts." in n}
    assert experts and experts <= {0, 1}
    assert not any(n.endswith("mlp.gate.weight") or "block_sparse_moe.gate" in n for n in moved)


def test_a_model_that_was_made_smaller_learns_from_the_dense_one(tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    result = compiled(dense, tmp_path / "out", "llm-pruner:50%,importance=l2", RECIPE)
    regions = result.runs[0].regions
    assert [r.loss for r in regions] == ["error", "kl"] and all(r.after < r.before for r in regions)
    assert load(tmp_path / "out").config.intermediate_size == 32


@pytest.mark.parametrize(
    ("passes", "options", "error", "says"),
    [
        (["refine"], {}, SpecError, "its own teacher"),
        (["refine", "wanda:2:4"], {}, SpecError, "its own teacher"),
        (["wanda:2:4"], {"teacher": "dense"}, SpecError, "no pass that fits"),
        (["refine"], {"teacher": "dense"}, SpecError, "nothing is pruned"),
        (["wanda:2:4", "refine:guard=0.01"], {}, CalibrationError, "on 32 sequences in 16 batches: none to hold back"),
        (["wanda:2:4", "refine"], {"teacher": "narrow"}, SpecError, r"shape \[2, 12, 32\], and \[2, 12, 16\]"),
        (["wanda:2:4", "refine"], {"teacher": "deep"}, SpecError, "2 blocks, and 3 in the teacher"),
        (["wanda:2:4", "refine"], {"teacher": "words"}, SpecError, "a vocabulary of 62 tokens, and 64"),
        (["llm-pruner:50%,granularity=layer", "refine"], {}, SpecError, "without some of its blocks"),
        (["llm-pruner:25%,granularity=channel", "refine"], {}, SpecError, "another residual width"),
        (["llm-pruner:50%,granularity=layer", "refine"], {"teacher": "dense"}, SpecError, "some of its blocks"),
        (["llm-pruner:25%", "refine"], {"teacher": "words"}, SpecError, "a vocabulary of 62 tokens, and 64"),
        (["llm-pruner:25%", "refine:guard=0.01"], {}, CalibrationError, "none to hold back"),
        (["permute:2:4", "wanda:2:4", "refine:guard=0.01"], {}, CalibrationError, "none to hold back"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    passes: list[str], options: dict[str, str], error: type[Exception], says: str, tmp_path: Path
) -> None:
    dense = save("llama", tmp_path / "dense")
    others = {"narrow": {"hidden_size": 16}, "deep": {"num_hidden_layers": 3}, "words": {"vocab_size": 62}}
    for name, change in others.items():
        if options.get("teacher") == name:
            hf.LlamaForCausalLM(hf.LlamaConfig(**{**GQA, **change})).save_pretrained(tmp_path / name)
    given = {key: tmp_path / value for key, value in options.items()}
    # Before any pass has run, which may have taken hours.
    ran = dict.fromkeys(("prune_weights", "make_smaller", "reorder"), DEFAULT)
    with patch.multiple(stages, **ran) as others, pytest.raises(error, match=says):
        compiled(dense, tmp_path / "out", *passes, **given)
    assert not any(other.called for other in others.values())
    assert not (tmp_path / "out").exists()


def test_a_model_without_blocks_is_refused_before_any_pass_runs() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    with patch.object(stages, "prune_weights") as ran, pytest.raises(TraceError, match="no repeated blocks"):
        sparsify.compile(net, ["wanda:2:4", "refine"], calibration=[torch.randn(16, 8)])
    assert not ran.called


@pytest.mark.parametrize("option", ["epochs=0", "rate=2", "rate=fast", "guard=0", "guard=0.9", "last=mse", "batch=0"])
def test_options_that_mean_nothing_are_refused(option: str) -> None:
    from sparsify.method.spec import parse_pass

    with pytest.raises(SpecError, match=option.partition("=")[0]):
        parse_pass(f"refine:{option}")


def test_a_loss_that_is_no_number_names_the_block(tmp_path: Path) -> None:
    dense = build("llama")
    with torch.no_grad():
        dense.model.layers[0].mlp.down_proj.weight *= 1e25
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(
        CalibrationError, match=r"refining model.layers.0: a loss that is NaN or infinite before the first step"
    ):
        compiled(tmp_path / "dense", tmp_path / "out", "magnitude:2:4", "refine:epochs=1,rate=0.9")


@pytest.mark.first(5)
@pytest.mark.parametrize(
    "family", [f if f in ("gpt2", "qwen3_moe") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_every_family_learns_and_keeps_its_zeros(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "dense")
    batches = [inputs(family, seed=seed) for seed in range(8)]
    for out, passes in (("pruned", ["magnitude:50%"]), ("out", ["magnitude:50%", "refine:epochs=1,rate=0.01"])):
        data = load_calibration(batches, open_source(tmp_path / "dense"), rows=2)
        result = sparsify.compile(tmp_path / "dense", passes, calibration=data, output=tmp_path / out, device="cpu")
    regions = result.runs[1].regions
    assert regions and all(r.after <= r.before for r in regions)
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "out")
    for run in result.runs[0].sites:
        for name in run.sources:
            assert torch.equal(before[name] == 0, after[name] == 0), name
    load(tmp_path / "out")
