"""Packed folders that are damaged, lie, or come from the future: refused before anything is read wrongly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import save
from support.manifests import edit_manifest, reseal

import sparsify
from sparsify.backends.packed.config import sites_of
from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.frontend.source import open_source

UP = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module", params=["packed24", "bitmask", "packed24,values=int8", "bitmask,values=int4"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("sound")
    save("llama", root / "dense")
    to = f"packed:layout={request.param},choice=smallest"
    sparsify.compile(root / "dense", ["magnitude:2:4"], output=root / "packed", to=to)
    return root / "packed", f"{UP}_{'meta' if request.param.startswith('packed24') else 'mask'}"


@pytest.fixture(scope="module", params=["packed24", "bitmask", "dense"])
def few(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of 4 bits whose every weight is of that layout."""
    root = tmp_path_factory.mktemp("few")
    save("llama", root / "dense")
    to = f"packed:layout={request.param},values=int4,group=32,choice=smallest"
    sparsify.compile(root / "dense", ["magnitude:2:4"], output=root / "packed", to=to)
    return root / "packed", f"{UP}_integers"


Change = Callable[[dict[str, torch.Tensor], dict[str, Any], str], None]


def refuses(sound: tuple[Path, str], tmp_path: Path, change: Change, *says: str) -> None:
    """Our own reader and transformers both refuse what ``change`` made, with the same words."""
    folder = tmp_path / "bad"
    shutil.copytree(sound[0], folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config, sound[1])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    # What was damaged on the way is seen by its digests alone; here whoever made the folder lies.
    reseal(folder)
    with pytest.raises(SparsifyError) as ours:
        source = open_source(folder)
        for name in source.weights.parameters():
            source.weights.read(name)
    with pytest.raises(SparsifyError) as theirs:
        transformers.LlamaForCausalLM.from_pretrained(folder)
    for word in says:
        assert word in str(ours.value) and word in str(theirs.value), (str(ours.value), str(theirs.value))
    with pytest.raises(SparsifyError):
        unpack_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.first(2)
def test_a_newer_format(sound: tuple[Path, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], codes: str) -> None:
        config["quantization_config"] |= {"format": 3, "something": "new"}

    refuses(sound, tmp_path, change, "format 3", "newer sparsify")


def test_a_missing_tensor(sound: tuple[Path, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], codes: str) -> None:
        del tensors[codes]

    refuses(sound, tmp_path, change, UP, "does not hold it")


def test_a_truncated_tensor(sound: tuple[Path, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], codes: str) -> None:
        tensors[UP] = tensors[UP][:-1].clone()

    refuses(sound, tmp_path, change, UP, "belong")


def test_indices_out_of_range(sound: tuple[Path, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], codes: str) -> None:
        tensors[codes].view(torch.uint8).view(-1)[3] = 0xFF

    refuses(sound, tmp_path, change, UP)


def test_shapes_that_disagree(sound: tuple[Path, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], codes: str) -> None:
        config["quantization_config"]["sites"][UP]["rows"] += 1

    refuses(sound, tmp_path, change, UP)


def test_a_parameter_that_the_model_has_not(sound: tuple[Path, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], codes: str) -> None:
        suffix = codes.removeprefix(UP)
        config["quantization_config"]["sites"]["model.other.weight"] = config["quantization_config"]["sites"].pop(UP)
        tensors["model.other.weight"], tensors[f"model.other.weight{suffix}"] = tensors.pop(UP), tensors.pop(codes)

    refuses(sound, tmp_path, change, "model.other")


@pytest.mark.parametrize("cut", [1, 1000, 20000])
def test_a_truncated_file(sound: tuple[Path, str], tmp_path: Path, cut: int) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(sound[0], folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="safetensors"):
        open_source(folder)
    with pytest.raises(Exception, match=r"safetensors|Safetensor|incomplete|header"):
        transformers.LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.first(1)
def test_scales_that_are_no_numbers(few: tuple[Path, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], values: str) -> None:
        tensors[UP][1, -1] = float("inf")

    refuses(few, tmp_path, change, UP)


def test_integers_that_are_missing(few: tuple[Path, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], values: str) -> None:
        del tensors[values]

    refuses(few, tmp_path, change, f"{UP}_integers", "does not hold it")


def test_integers_of_another_kind(few: tuple[Path, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], values: str) -> None:
        tensors[values] = tensors[values].view(torch.int8)

    refuses(few, tmp_path, change, f"{UP}_integers", "torch.uint8", "belong")


def test_too_few_integers(few: tuple[Path, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], values: str) -> None:
        tensors[values] = tensors[values][..., 1:].contiguous()

    refuses(few, tmp_path, change, f"{UP}_integers", "belong")


@pytest.mark.parametrize(("field", "value"), [("bits", 8), ("bits", 3), ("bits", None), ("group", 64), ("group", 0)])
def test_bits_and_groups_that_the_tensors_have_not(
    few: tuple[Path, str], tmp_path: Path, field: str, value: int | None
) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], values: str) -> None:
        config["quantization_config"]["sites"][UP][field] = value

    refuses(few, tmp_path, change, UP)


def test_few_bits_in_a_format_that_has_none(few: tuple[Path, str], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any], values: str) -> None:
        config["quantization_config"]["format"] = 1

    refuses(few, tmp_path, change, "few bits in format 1")


def test_activations_of_nonsense(few: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(few[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["activations"] = "int3"
    (folder / "config.json").write_text(json.dumps(config))
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"activations 'int3'.*int8 or float"):
        transformers.LlamaForCausalLM.from_pretrained(folder)


json_values = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.just([]) | st.just({})


@given(
    st.dictionaries(st.sampled_from([*PackedSite.__dataclass_fields__, "more"]), json_values), json_values, json_values
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_config_of_nonsense(entry: dict[str, Any], whole: Any, version: Any) -> None:
    good = {"layout": "packed24", "rows": 8, "columns": 64, "experts": None, "transposed": False, "values": 256}
    small = {**good, "bits": 4, "group": 32}
    for sites in ({"w": {**good, **entry}}, {"w": {**small, **entry}}, {"w": whole}, whole):
        for number in (1, 2, version):
            try:
                found = sites_of(
                    {"quantization_config": {"quant_method": "sparsify", "format": number, "sites": sites}}, "x"
                )
            except CheckpointError:
                continue
            assert found is not None
            for site in found.values():
                assert site.height * site.columns >= 1 and all(n >= 0 for n in site.values_shape + site.codes_shape)


def test_a_manifest_that_lies_about_the_dense_files(sound: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(sound[0], folder)

    def lie(manifest: dict[str, Any]) -> None:
        files = manifest["packed"]["dense_files"]
        manifest["packed"]["dense_files"] = {"../outside.safetensors": files["model.safetensors"]}

    edit_manifest(folder, lie)
    with pytest.raises(CheckpointError, match="dense_files"):
        unpack_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "outside.safetensors").exists()
