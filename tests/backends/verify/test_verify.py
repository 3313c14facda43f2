"""``sparsify verify`` passes on what is right and fails on each thing that can be wrong, naming it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES
from support.manifests import as_format_1, edit_manifest

import sparsify
from sparsify.backends.onnx.expand import expand
from sparsify.backends.verify.checkpoint import verify_checkpoint
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.errors import SparsifyError


@pytest.fixture
def folders(written: Callable[[str, str], Path]) -> dict[str, Path]:
    """The tiny Llama pruned 2:4 by magnitude, as link, packed, plain checkpoint; and the dense one."""
    backends = {"dense": "dense", "link": "onnx", "packed": "onnx:weights=packed,dtype=float16", "hf": "hf"}
    return {name: written("llama", to) for name, to in backends.items()}


@pytest.fixture
def link(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["link"], tmp_path / "link"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def forget(folder: Path) -> None:
    (folder / "sparsify.json").unlink()


NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("kind", ["link", "packed"])
def test_what_was_written_is_sound(folders: dict[str, Path], kind: str) -> None:
    result = verify_onnx(folders[kind])
    assert result.sound, result.problems
    pruned = [w for w in result.weights if w.pattern == "2:4"]
    assert len(pruned) == 14 and all(w.axis == 1 and w.equal for w in pruned)
    assert {w.format for w in pruned} == {"dense" if kind == "link" else "2:4"}
    assert result.behaviour is not None and result.behaviour.agreeing == result.behaviour.tokens == 32
    assert result.behaviour.difference < 1e-5
    assert [w.tensorrt for w in pruned] == [None] * 14


def test_one_flipped_weight_is_named(link: Path) -> None:
    edit(link, lambda t: t[NAME].view(-1)[:1].add_(1.0) if t[NAME].view(-1)[0] else t[NAME].view(-1)[:1].fill_(1.0))
    problems = verify_onnx(link).problems
    assert any(NAME in p and "checksum" in p for p in problems)


def test_one_pruned_weight_that_came_back_breaks_the_pattern_even_without_its_checksum(link: Path) -> None:
    as_format_1(link)
    edit_manifest(link, lambda manifest: manifest["checksums"].pop(NAME))

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        row = tensors[NAME].view(-1)
        row[int((row == 0).nonzero()[0])] = 0.5

    edit(link, fill)
    assert any("2:4 does not hold along axis 1" in p and NAME in p for p in verify_onnx(link).problems)


def test_a_weight_that_differs_from_a_named_checkpoint(folders: dict[str, Path], link: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folders["hf"], tmp_path / "hf"))
    edit(other, lambda t: t["model.norm.weight"].add_(1))
    assert any("header of model.safetensors" in p or "checksum" in p for p in verify_onnx(link, against=other).problems)
    forget(other)
    problems = verify_onnx(link, against=other).problems
    assert any(p.startswith("model.norm.weight: onnxruntime gives other values") for p in problems)


def test_pruning_along_the_wrong_axis(link: Path) -> None:
    def turn(tensors: dict[str, torch.Tensor]) -> None:
        weight = torch.randn_like(tensors[NAME])
        weight.t().contiguous()
        columns = weight.t().reshape(-1, 4).clone()
        columns[:, :2] = 0
        tensors[NAME] = columns.reshape(weight.shape[1], weight.shape[0]).t().contiguous()

    edit(link, turn)
    assert any(p.startswith(NAME) and "wrong axis" in p for p in verify_onnx(link).problems)
    forget(link)
    problems = verify_onnx(link, run=False).problems
    assert problems == [f"{NAME}: 2:4 holds along axis 0, but Gemm sums over axis 1: pruned along the wrong axis"]


def test_a_file_of_another_exporter(folders: dict[str, Path], tmp_path: Path) -> None:
    """torch's own exporter transposes and renames: the axis is found in the graph, the weights by their values."""
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    with torch.no_grad():
        net[0].weight.view(-1, 4)[:, :2] = 0
        # The other one along its outputs, as a tool that knows no axis would.
        net[2].weight.copy_(net[0].weight.t())
    out = tmp_path / "other"
    out.mkdir()
    x = torch.randn(2, 4, 32)
    torch.onnx.export(net, (x,), out / "theirs.onnx", dynamo=True, verbose=False, external_data=False)
    save_file(net.state_dict(), out / "model.safetensors")
    result = verify_onnx(out, run=False)
    assert len(result.weights) == 2 and all(w.equal for w in result.weights)
    (problem,) = result.problems
    assert "wrong axis" in problem
    good = next(w for w in result.weights if w.pattern == "2:4")
    assert not problem.startswith(good.name)


def test_a_promised_pattern_can_be_asked_for(link: Path) -> None:
    forget(link)
    assert verify_onnx(link, pattern="2:4", run=False).sound
    assert any("1:4 does not hold" in p for p in verify_onnx(link, pattern="1:4", run=False).problems)


def test_a_truncated_file_behind_the_link_is_named(link: Path) -> None:
    path = link / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    problems = verify_onnx(link).problems
    assert any("does not hold it" in p and "tensor model.norm.weight" in p for p in problems), problems
    path.unlink()
    assert all("tensor" in p for p in verify_onnx(link).problems[1:])


def test_links_and_places_outside_the_folder_are_refused(link: Path, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere.safetensors"
    (link / "model.safetensors").rename(real)
    (link / "model.safetensors").symlink_to(real)
    with pytest.raises(SparsifyError, match="is a link"):
        verify_onnx(link)
    (link / "model.safetensors").unlink()
    (link / "model.safetensors").hardlink_to(real)
    assert any("links in the folder" in p for p in verify_onnx(link, run=False).problems)


def test_shapes_edited_by_hand(link: Path) -> None:
    model = onnx.load(link / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == NAME)
    tensor.dims[0] += 4
    onnx.save(model, link / "model.onnx")
    result = verify_onnx(link)
    assert not result.sound and any(NAME in p for p in result.problems)


def test_nonsense(tmp_path: Path, link: Path) -> None:
    with pytest.raises(SparsifyError, match="no such folder"):
        verify_onnx(tmp_path / "nowhere")
    (tmp_path / "x.onnx").write_bytes(b"not a model at all")
    with pytest.raises(SparsifyError, match="not an ONNX model"):
        verify_onnx(tmp_path / "x.onnx")
    (link / "sparsify.json").write_text("{")
    with pytest.raises(SparsifyError, match="not JSON"):
        verify_onnx(link)


def test_an_ordinary_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    result = verify_checkpoint(folders["hf"])
    assert result.sound and sum(w.pattern == "2:4" for w in result.weights) == 14
    bad = Path(shutil.copytree(folders["hf"], tmp_path / "hf"))
    edit(bad, lambda t: t[NAME].fill_(1.0))
    problems = verify_checkpoint(bad).problems
    assert any(NAME in p and "checksum" in p for p in problems) and any("2:4 does not hold" in p for p in problems)


def test_expand_gives_the_dense_bytes_and_a_folder_for_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    packed = Path(shutil.copytree(folders["packed"], tmp_path / "packed"))
    dense = expand(packed, tmp_path / "expanded")
    want = load_file(folders["hf"] / "model.safetensors")
    got = load_file(dense / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor.half()) for name, tensor in want.items())
    assert verify_onnx(dense).sound
    carried = {p.name for p in packed.iterdir()} - {"model.onnx.data"}
    assert {p.name for p in dense.iterdir()} == carried | {"model.safetensors"} and "genai_config.json" in carried
    assert transformers.AutoModelForCausalLM.from_pretrained(dense).dtype == torch.float16
    assert (packed / "model.onnx.data").exists()
    expand(packed)
    assert not (packed / "model.onnx.data").exists() and (packed / "model.safetensors").exists()
    with pytest.raises(SparsifyError, match="no packed weight"):
        expand(packed)
    with pytest.raises(SparsifyError, match="exists already"):
        expand(folders["packed"], dense)


@pytest.mark.first(2)
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_sound_after_pruning(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The axis of every pruned weight is found in the graph, whatever the architecture."""
    result = sparsify.compile(folder(family), ["magnitude:2:4"], to="onnx", output=tmp_path / "out")
    checked = verify_onnx(tmp_path / "out")
    assert checked.sound and not checked.unchecked, (checked.problems, checked.unchecked)
    assert all(w.equal for w in checked.weights)
    pruned = {source for site in result.runs[0].sites for source in site.sources}
    assert {w.name for w in checked.weights if w.pattern == "2:4"} >= pruned
    seen = checked.behaviour
    assert seen is not None and seen.difference < 1e-5 and seen.agreeing == seen.tokens
