"""Channels in another order: the function is the same, all else is identical, and N:M keeps more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import families, kinds
from support.command_line import sparsify as command
from support.families import FAMILIES, build, inputs, save
from support.folders import load
from support.recurrent import RECURRENT as RECURRENT
from support.recurrent import recurrent
from torch import Tensor, nn

import sparsify
from sparsify.data.batches import load_calibration
from sparsify.errors import SpecError
from sparsify.evaluation.compare import compare
from sparsify.frontend.source import open_source
from sparsify.method.spec import parse_pass, spec_text
from sparsify.passes.permute import Permute


def text(rows: int = 32) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 60, (rows, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part} for part in ids.split(2)]


def compiled(source: Any, *passes: str, **options: Any) -> Any:
    data = load_calibration(text(), open_source(source), rows=2)
    return sparsify.compile(source, passes, calibration=data, device="cpu", **options)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def shaken(model: Any) -> Any:
    """With vectors that are not all alike: norms, biases and scales of layers that begin at nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(1)
            if parameter.dim() == 1 or name.endswith(("bias", "A_log")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def check(model: Any, batch: dict[str, Tensor], run: Any) -> Any:
    """The outputs are the same within 1e-5, and every tensor in no group to the bit."""
    result = sparsify.compile(model, ["permute:2:4"], calibration=[batch])
    (one,) = result.runs
    assert one.channels and all(group.before <= group.after <= 1 + 1e-9 for group in one.channels)
    assert sum(group.moved for group in one.channels) > 0
    before, after = run(model, batch), run(result.model, batch)
    assert torch.allclose(before, after, atol=1e-5 * max(1.0, float(before.abs().max())), rtol=0)
    was, now = dict(model.named_parameters()), dict(result.model.named_parameters())
    written = {name for group in one.channels for name in group.written}
    assert written == one.written and written
    for name, value in was.items():
        same = torch.equal(value, now[name])
        assert same == (name not in written), name
        assert torch.equal(value.flatten().sort().values, now[name].flatten().sort().values), name
    return result


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_the_function_is_the_same(family: str) -> None:
    check(shaken(build(family)), inputs(family, rows=4), families.run)


@pytest.mark.first(2)
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_the_same_in_every_family(family: str) -> None:
    check(shaken(build(family)), inputs(family, rows=4), families.run)


@pytest.mark.first(3)
@pytest.mark.slow
@pytest.mark.parametrize("family", RECURRENT)
def test_the_function_is_the_same_where_layers_loop(family: str) -> None:
    check(shaken(recurrent(family)), inputs("llama"), families.run)


@pytest.mark.first(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["whisper", "clip", "lfm2", "qwen2_vl", "wav2vec2", "informer", "deberta", "falcon_h1"]
)
def test_the_function_is_the_same_in_other_kinds(kind: str) -> None:
    check(shaken(kinds.build(kind).eval()), kinds.batch(kind), kinds.run)


def test_half_of_a_reordering_is_another_function() -> None:
    """What the comparison above would see."""
    model, batch = build("llama"), inputs("llama", rows=4)
    result = check(model, batch, families.run)
    other = result.model
    before = families.run(model, batch)
    for name in ("mlp.up_proj", "self_attn.o_proj"):
        kept = other.get_submodule(f"model.layers.0.{name}").weight
        moved = kept.detach().clone()
        with torch.no_grad():
            kept.copy_(model.get_submodule(f"model.layers.0.{name}").weight)
        assert float((families.run(other, batch) - before).abs().max()) > 1e-4, name
        with torch.no_grad():
            kept.copy_(moved)


def test_wanda_keeps_as_much_as_was_said() -> None:
    """2:4 by Wanda's metric after it, in squares over all inputs: the share that the report says."""
    model, batch = build("llama"), inputs("llama", rows=4)
    result = sparsify.compile(model, ["permute:2:4", "wanda:2:4"], calibration=[batch], schedule="dense")
    hidden: list[Tensor] = []
    layer = sparsify.compile(model, ["permute:2:4"], calibration=[batch]).model.requires_grad_(False)
    layer.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    families.run(layer, batch)
    norms = hidden[0].flatten(0, 1).square().sum(0)
    whole = (layer.model.layers[0].mlp.down_proj.weight.square() * norms).sum()
    kept = (result.weight("model.layers.0.mlp.down_proj.weight").square() * norms).sum()
    (said,) = [g for g in result.runs[0].channels if g.name == "model.layers.0.mlp.down_proj"]
    assert float(kept / whole) == pytest.approx(said.after, rel=1e-4) and said.after > said.before + 0.01


@pytest.mark.first(1)
@pytest.mark.parametrize("spec", ["twin:2:4", "sparsegpt:2:4"])
def test_passes_after_it_see_the_dense_model_in_its_new_order(spec: str, tmp_path: Path) -> None:
    """In one compile as in two."""
    dense = save("llama", tmp_path / "dense")
    compiled(dense, "permute:2:4", output=tmp_path / "ordered")
    compiled(tmp_path / "ordered", spec, output=tmp_path / "two")
    compiled(dense, "permute:2:4", spec, output=tmp_path / "one")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.first(1)
@pytest.mark.parametrize("schedule", ["layer", "block"])
def test_refine_after_it(schedule: Any, tmp_path: Path) -> None:
    """Fits to the same block outputs: what was lost in one compile is what was lost against the dense model's."""
    dense = save("llama", tmp_path / "dense")
    first = "wanda:2:4" if schedule == "block" else "twin:2:4"
    refine = "refine:epochs=2,rate=0.02"
    result = compiled(dense, "permute:2:4", first, refine, output=tmp_path / "out", schedule=schedule)
    compiled(dense, "permute:2:4", first, output=tmp_path / "pruned", schedule=schedule)
    named = compiled(tmp_path / "pruned", refine, teacher=dense, schedule=schedule)
    (ours,), (theirs,) = ([r.regions for r in one.runs if r.regions] for one in (result, named))
    assert [r.before for r in ours] == pytest.approx([r.before for r in theirs], rel=1e-4)
    assert any(region.after < region.before for region in ours)
    for name, value in tensors(tmp_path / "out").items():
        if "proj" in name:
            assert int((value != 0).unflatten(-1, (-1, 4)).sum(-1).max()) <= 2, name
    said = json.loads((tmp_path / "out" / "sparsify.json").read_text())["passes"][0]
    assert said["spec"] == "permute:2:4" and len(said["channels"]) == 4
    assert all(group["kept_before"] < group["kept_after"] for group in said["channels"])


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize("to", ["packed:choice=smallest", pytest.param("onnx", marks=pytest.mark.slow)])
def test_outputs_of_other_kinds(to: str, tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    hf = compiled(dense, "permute:2:4", "wanda:2:4", output=tmp_path / "hf")
    other = compiled(dense, "permute:2:4", "wanda:2:4", output=tmp_path / "other", to=to)
    batch = inputs("llama")
    assert torch.equal(families.run(hf.model, batch), families.run(other.model, batch))
    assert torch.equal(families.run(load(tmp_path / "hf"), batch), families.run(hf.model, batch))


def test_a_bfloat16_checkpoint_keeps_every_number(tmp_path: Path) -> None:
    model = build("qwen3_moe").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    compiled(tmp_path / "dense", "permute:2:4", output=tmp_path / "out")
    was, now = tensors(tmp_path / "dense"), tensors(tmp_path / "out")
    assert list(was) == list(now)
    for name, value in was.items():
        assert now[name].dtype == torch.bfloat16
        assert torch.equal(value.flatten().sort().values, now[name].flatten().sort().values), name
        moves = "experts" in name or ".v_proj" in name or ".o_proj" in name
        assert moves or torch.equal(value, now[name]), name


def test_names_are_respected() -> None:
    model = build("llama")
    result = compiled(model, "permute:2:4", ignore=["*.0.mlp.up_proj", "*.self_attn.v_proj"])
    (one,) = result.runs
    assert [group.name for group in one.channels] == ["model.layers.1.mlp.down_proj"]
    assert {s.node: s.reason for s in one.skipped}["model.layers.0.mlp.down_proj"].endswith("named by --ignore")
    only = compiled(model, "permute:2:4", only=["*.1.mlp"]).runs[0]
    assert [group.name for group in only.channels] == ["model.layers.1.mlp.down_proj"]
    with pytest.raises(SpecError, match="not named by --only"):
        compiled(model, "permute:2:4", only=["*.down_proj"])


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


def test_what_cannot_be_done_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no channels that may change places"):
        sparsify.compile(Square(), ["permute:2:4"], calibration=[torch.randn(4, 16)])
    for share in ("50%", "0.5"):
        with pytest.raises(SpecError, match="the same in any order"):
            parse_pass(f"permute:{share}")
    with pytest.raises(SpecError, match="pattern"):
        parse_pass("permute")
    dense = save("llama", tmp_path / "dense")
    for passes in (["wanda:2:4", "permute:2:4"], ["twin:2:4", "refine", "permute:2:4"]):
        with pytest.raises(SpecError, match="zeros whose pattern another order of channels"):
            sparsify.compile(dense, passes, output=tmp_path / "out")
    compiled(dense, "magnitude:2:4", output=tmp_path / "pruned")
    for pattern in ("2:4", "4:8"):
        with pytest.raises(SpecError, match="2:4 zeros, which another order would break"):
            compiled(tmp_path / "pruned", f"permute:{pattern}", output=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "pruned"]


def test_what_is_pruned_without_a_pattern_is_reordered(tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    compiled(dense, "magnitude:50%", output=tmp_path / "pruned")
    result = compiled(tmp_path / "pruned", "permute:2:4")
    assert len(result.runs[0].channels) == 4


def test_a_spec_is_read_as_it_was_written() -> None:
    own = parse_pass("permute:4:8")
    assert isinstance(own, Permute) and spec_text(own) == "permute:4:8" and own.needs_data
    assert parse_pass(spec_text(own)) == own


def test_the_command_line_says_what_was_gained(tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    words = ["compile", str(dense), "--pass", "permute:2:4", "--pass", "wanda:2:4", "--calibration", "random"]
    words += ["--samples", "4", "--sequence-length", "16", "-o", str(tmp_path / "out")]
    planned = command(*words, "--dry-run")
    assert planned.returncode == 0 and "permute:2:4 would reorder" in planned.stdout
    done = command(*words)
    assert done.returncode == 0 and "2 × 8" in done.stdout
    assert "what the pattern would keep" in " ".join(done.stdout.split()) and "0.self_attn.o_proj" in done.stdout
    assert "permute:PATTERN" in command("passes").stdout


def test_compared_with_others_errors_are_in_the_new_order(tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    found = compare(dense, ["wanda:2:4", "permute:2:4+wanda:2:4"], calibration=text(), device="cpu")
    _, plain, ordered = found.rows
    assert plain.error is not None and ordered.error is not None
    assert ordered.error < plain.error * 1.02
