"""One number that is NaN or infinite, wherever it lies: named, and nothing written; or said, where it was allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import sparsify as run
from support.families import build, inputs, save
from support.folders import SMALLEST
from support.manifests import reseal

import sparsify
from sparsify.backends.onnx import export_onnx
from sparsify.backends.onnx.expand import expand
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.backends.verify.checkpoint import verify_checkpoint
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.errors import BackendError, CalibrationError, CheckpointError, SparsifyError
from sparsify.evaluation.compare import compare
from sparsify.evaluation.evaluate import evaluate
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.ledger import Ledger
from sparsify.files.manifest import read_manifest
from sparsify.inspection.graph import inspect_graph

IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
# An embedding row that no batch uses, the last norm, the head: none is pruned, and none reaches a pruned weight.
PLACES = {
    "model.embed_tokens.weight": (62, 3),
    "model.norm.weight": (5,),
    "lm_head.weight": (1, 1),
    "model.layers.1.input_layernorm.weight": (0,),
}
BACKENDS: dict[str, Any] = {"hf": "hf", "packed": SMALLEST, "link": "onnx", "external": "onnx:weights=external"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "ids.safetensors"
    save_file({"input_ids": torch.arange(400) % 57 + 3}, path)
    return str(path)


def spoil(folder: Path, name: str, index: tuple[int, ...], value: float = torch.nan) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name][index] = value
    save_file(tensors, file, metadata={"format": "pt"})


# Tracing and exporting ONNX takes seconds each.
TRACED = [(name, to) for name in list(PLACES)[1:] for to in ("link", "external")]


@pytest.mark.parametrize(
    ("name", "to"),
    [pytest.param(n, to, marks=pytest.mark.slow if (n, to) in TRACED else []) for n in PLACES for to in BACKENDS],
)
def test_what_is_carried_over_is_looked_at(name: str, to: str, model: Path, tmp_path: Path) -> None:
    spoil(model, name, PLACES[name], -torch.inf if to == "packed" else torch.nan)
    with pytest.raises(CheckpointError) as caught:
        sparsify.compile(model, ["wanda:2:4"], calibration=[IDS], output=tmp_path / "out", to=BACKENDS[to])
    said = str(caught.value)
    assert f"tensor {name} of {model}" in said and "--allow-nan" in said
    assert f"1 in all, the first at {list(PLACES[name])}" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    build("llama").to(dtype).save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model", "model.norm.weight", (31,), torch.inf)
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight"):
        sparsify.compile(tmp_path / "model", ["magnitude:2:4"], output=tmp_path / "out")


def test_a_structural_pass_and_a_pickle(model: Path, tmp_path: Path) -> None:
    spoil(model, "model.norm.weight", (5,))
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight"):
        sparsify.compile(model, ["llm-pruner:50%,importance=l1"], output=tmp_path / "out")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight"):
        sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out", allow_bin=True)


def test_a_module_and_its_buffers(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[62, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight of LlamaForCausalLM.*first at \[62, 3\]"):
        sparsify.compile(model, ["wanda:2:4"], calibration=[IDS])
    sparsify.compile(model, ["wanda:2:4"], calibration=[IDS], allow_nan=True)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    # A mask that forbids by minus infinity is a buffer's good right; NaN is not.
    net.register_buffer("causal", torch.full((4, 4), -torch.inf).triu(1))
    sparsify.compile(net, ["wanda:2:4"], calibration=[torch.randn(8, 8)])
    net.causal[0, 1] = torch.nan
    with pytest.raises(CheckpointError, match="tensor causal of Sequential"):
        sparsify.compile(net, ["wanda:2:4"], calibration=[torch.randn(8, 8)])
    graph = torch.export.export(torch.nn.Sequential(torch.nn.Linear(8, 8)), (torch.randn(2, 8),))
    graph.state_dict["0.bias"].data[2] = torch.nan
    with pytest.raises(CheckpointError, match=r"tensor 0\.bias"):
        export_onnx(graph, tmp_path / "graph")
    export_onnx(graph, tmp_path / "graph", allow_nan=True)


@pytest.mark.parametrize("name", ["h.0.attn.masked_bias", "final_logits_bias", "h.0.attn.bias", "mask.weight"])
def test_masks_in_old_checkpoints(name: str, tmp_path: Path) -> None:
    """What forbids by minus infinity, as GPT-Neo's -1e9 does once it was float16, passes by its name alone."""
    for value in (-torch.inf, torch.inf, torch.nan):
        save_file({name: torch.tensor([0.0, value])}, tmp_path / "model.safetensors")
        opened = Checkpoint(tmp_path, ledger=Ledger(tmp_path, finite=True))
        (tmp_path / "copy").mkdir(exist_ok=True)
        reads: list[Callable[[], object]] = [partial(opened.read, name), partial(opened.copy_to, tmp_path / "copy")]
        for read in reads:
            if value == -torch.inf and name.endswith(("masked_bias", "final_logits_bias")):
                read()
            else:
                with pytest.raises(CheckpointError, match=name):
                    read()


@pytest.mark.slow
def test_what_was_allowed_is_said(model: Path, tmp_path: Path) -> None:
    spoil(model, "model.embed_tokens.weight", (62, 3))
    for to in BACKENDS:
        out = tmp_path / to
        sparsify.compile(model, ["wanda:2:4"], calibration=[IDS], output=out, to=BACKENDS[to], allow_nan=True)
        assert read_manifest(out)["allow_nan"] is True
    found = verify_checkpoint(tmp_path / "hf")
    assert found.sound and any("--allow-nan let pass" in line for line in found.unchecked)
    with pytest.raises(CheckpointError, match="embed_tokens"):
        unpack_folder(tmp_path / "packed", tmp_path / "dense")
    dense = unpack_folder(tmp_path / "packed", tmp_path / "dense", allow_nan=True)
    assert read_manifest(dense)["allow_nan"] is True
    assert Checkpoint(dense).digests() == Checkpoint(tmp_path / "hf").digests()
    # In a weight that is pruned it has no order.
    spoil(model, "model.layers.0.mlp.up_proj.weight", (0, 0))
    with pytest.raises(CalibrationError, match="up_proj"):
        sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "no", allow_nan=True)


@pytest.mark.slow
def test_readers_of_our_folders(model: Path, text: str, tmp_path: Path) -> None:
    name = "model.norm.weight"
    for to in ("hf", "packed", "onnx-packed"):
        kind = BACKENDS.get(to, "onnx:weights=packed")
        sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / to, to=kind)
    for to in ("hf", "packed"):
        spoil(tmp_path / to, name, (3,))
        reseal(tmp_path / to)
        assert any(f"{name}: NaN" in problem for problem in verify_checkpoint(tmp_path / to).problems)
    readers: dict[str, Callable[[], object]] = {
        "eval": lambda: evaluate(tmp_path / "hf", text, sequence_length=16),
        "eval packed": lambda: evaluate(tmp_path / "packed", text, sequence_length=16),
        "compare": lambda: compare(tmp_path / "hf", ["magnitude:50%"], calibration=[IDS], data=text),
        "unpack": lambda: unpack_folder(tmp_path / "packed", tmp_path / "dense"),
        "load": lambda: sparsify.load(tmp_path / "hf"),
    }
    for what, read in readers.items():
        with pytest.raises(CheckpointError) as caught:
            read()
        assert f"tensor {name}" in str(caught.value), what
    assert f"{name} [32] float32" in inspect_graph(tmp_path / "hf")
    assert "1 in all, the first at [3]" in inspect_graph(tmp_path / "hf")


@pytest.mark.slow
def test_onnx_files(model: Path, tmp_path: Path) -> None:
    spoil(model, "model.norm.weight", (3,))
    for mode in ("link", "packed"):
        out = tmp_path / mode
        sparsify.compile(model, ["magnitude:2:4"], output=out, to=f"onnx:weights={mode}", allow_nan=True)
        found = verify_onnx(out, run=False)
        assert found.sound and any("model.norm.weight: NaN" in line for line in found.unchecked)
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight"):
        expand(tmp_path / "packed", tmp_path / "wide")
    assert read_manifest(expand(tmp_path / "packed", tmp_path / "wide", allow_nan=True))["allow_nan"] is True


@pytest.mark.slow
def test_a_stored_dtype_that_does_not_hold_the_numbers(model: Path, tmp_path: Path) -> None:
    spoil(model, "lm_head.weight", (1, 1), 1e6)
    with pytest.raises(BackendError, match=r"lm_head\.weight in torch.float16"):
        sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out", to="onnx:weights=external,dtype=float16")


def test_a_calibration_batch_is_named(model: Path) -> None:
    good = torch.randn(1, 8, 32)
    bad = good.clone()
    bad[0, 2, 1] = torch.nan
    batches = [{"inputs_embeds": x} for x in (good, good, good, bad)]
    with pytest.raises(CalibrationError, match=r"batch 3 of calibration input inputs_embeds.*first at \[0, 2, 1\]"):
        sparsify.compile(model, ["wanda:2:4"], calibration=batches)


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A float16 model whose weights are finite, and whose activations are not."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3e4)
        model.model.layers[0].mlp.up_proj.weight.mul_(3e4)
    model.half().save_pretrained(tmp_path / "half")
    return tmp_path / "half"


@pytest.mark.slow
def test_float16_that_overflows_is_no_perplexity(overflowing: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"NaN or infinite in window 0.*--compute-dtype float32"):
        evaluate(overflowing, text, sequence_length=16)
    with pytest.raises(CalibrationError, match="--compute-dtype float32"):
        compare(overflowing, ["magnitude:2:4"], data=text, calibration=[IDS], sequence_length=16)
    with pytest.raises(CalibrationError, match="--compute-dtype float32"):
        sparsify.compile(overflowing, ["wanda:2:4"], calibration=[IDS], output=tmp_path / "out")
    with pytest.raises(CalibrationError, match=r"the loss of calibration batch 0.*--compute-dtype float32"):
        sparsify.compile(overflowing, ["gblm:2:4"], calibration=[IDS])
    words = ["--data", text, "--sequence-length", "16", "--json"]
    done = run("eval", str(overflowing), *words)
    assert done.returncode == 1 and "inf" not in done.stdout and "--compute-dtype" in done.stderr
    done = run("eval", str(overflowing), *words, "--compute-dtype", "float32")
    assert done.returncode == 0 and 1 < json.loads(done.stdout)["perplexity"] < 1e30
    assert run("eval", str(overflowing), *words, "--compute-dtype", "int8").returncode == 2
    same = evaluate(overflowing, text, sequence_length=16, compute_dtype="float32").perplexity
    sparsify.load(overflowing).float().save_pretrained(tmp_path / "whole")
    assert same == evaluate(tmp_path / "whole", text, sequence_length=16).perplexity
    rows = compare(
        overflowing, ["magnitude:2:4"], data=text, calibration=[IDS], sequence_length=16, compute_dtype="float32"
    ).rows
    assert rows[0].perplexity == same


def test_float16_that_overflows_is_not_tuned(overflowing: Path, text: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from sparsify.tuning.recipe import Recipe
    from sparsify.tuning.tune import tune

    with pytest.raises(CalibrationError, match="convert the model"):
        tune(overflowing, text, tmp_path / "out", Recipe(steps=1, batch=4, micro=4, samples=8, length=16))
    assert not (tmp_path / "out").exists()


@pytest.mark.first(1)
@pytest.mark.parametrize("spec", ["wanda:2:4", "sparsegpt:2:4", "gblm:2:4", "magnitude:2:4"])
def test_what_is_computed_in_float32_is_stored_as_it_was(spec: str, tmp_path: Path) -> None:
    half = build("llama").bfloat16()
    half.save_pretrained(tmp_path / "half")
    half.float().save_pretrained(tmp_path / "whole")
    options: dict[str, Any] = {"calibration": [IDS], "overwrite": True}
    out = sparsify.compile(tmp_path / "half", [spec], output=tmp_path / "out", compute_dtype="float32", **options)
    assert out.manifest["compute_dtype"] == "float32" == read_manifest(tmp_path / "out")["compute_dtype"]
    other = sparsify.compile(tmp_path / "whole", [spec], output=tmp_path / "other", **options)
    pruned = {site.parameter for site in out.runs[0].sites}
    before = load_file(tmp_path / "half" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        if name not in pruned:
            assert torch.equal(tensor, before[name])
        elif spec != "sparsegpt:2:4":  # whose later layers see rounded weights here
            assert torch.equal(tensor == 0, other.weight(name) == 0), name
    first = next(iter(out.runs[0].sites)).parameter
    assert torch.equal(out.weight(first) == 0, other.weight(first) == 0)
    assert "compute_dtype" not in other.manifest and "allow_nan" not in other.manifest


@pytest.mark.slow
def test_a_module_keeps_its_dtype(tmp_path: Path) -> None:
    net = build("llama").bfloat16()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    out = sparsify.compile(net, ["wanda:2:4"], calibration=[IDS], compute_dtype="float32")
    assert all(torch.equal(before[n], t) and t.dtype == before[n].dtype for n, t in net.state_dict().items())
    assert out.model.lm_head.weight.dtype == torch.bfloat16
    whole = sparsify.compile(net.float(), ["wanda:2:4"], calibration=[IDS])
    for site in out.runs[0].sites:
        assert torch.equal(out.weight(site.parameter) == 0, whole.weight(site.parameter) == 0)
    vision = build("vit").bfloat16()
    vision.save_pretrained(tmp_path / "vit")
    sparsify.compile(
        tmp_path / "vit", ["wanda:2:4"], calibration=[inputs("vit")], compute_dtype="float32",
        output=tmp_path / "out", to=SMALLEST,
    )  # fmt: skip
    assert evaluate_dtype(tmp_path / "out") == torch.bfloat16


def evaluate_dtype(folder: Path) -> torch.dtype:
    return next(iter(sparsify.load(folder).parameters())).dtype


def test_a_smaller_model_in_another_dtype(tmp_path: Path) -> None:
    build("llama").bfloat16().save_pretrained(tmp_path / "half")
    passes = ["llm-pruner:50%", "wanda:2:4"]
    out = sparsify.compile(
        tmp_path / "half", passes, calibration=[IDS], output=tmp_path / "out", compute_dtype="float32"
    )
    assert out.manifest["compute_dtype"] == "float32"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("command", ["compile", "eval", "compare", "tune", "unpack", "expand"])
def test_the_help_says_it(command: str) -> None:
    said = run(command, "--help").stdout
    assert "--allow-nan" in said
    assert ("--compute-dtype" in said) == (command in ("compile", "eval", "compare"))


def test_a_dtype_that_is_none(model: Path) -> None:
    with pytest.raises(SparsifyError, match="compute dtype 'int8'"):
        sparsify.compile(model, ["magnitude:2:4"], compute_dtype="int8")
