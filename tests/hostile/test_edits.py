"""Folders and words changed by hand: files added or taken away, configs that contradict, plug-ins that misbehave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import save
from support.folders import SMALLEST

import sparsify
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.backends.verify.checkpoint import verify_checkpoint
from sparsify.errors import BackendError, CheckpointError, SpecError
from sparsify.files.staging import check_output
from sparsify.frontend import stores
from sparsify.frontend.source import open_source
from sparsify.method.pattern import parse_pattern
from sparsify.method.spec import parse_pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and what it was compiled to."""
    place = tmp_path_factory.mktemp("made")
    dense = save("llama", place / "dense")
    (dense / "README.md").write_text("a model")
    (dense / "tokenizer.json").write_text("{}")
    for name, to in (("hf", "hf"), ("packed", SMALLEST)):
        sparsify.compile(dense, ["magnitude:2:4"], output=place / name, to=to)
    return place


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def from_pretrained(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


READERS: dict[str, list[Callable[[Path], object]]] = {
    "hf": [open_source, sparsify.load],
    "packed": [open_source, sparsify.load, from_pretrained, lambda f: unpack_folder(f, f.parent / "out")],
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "added",
    ["pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json", "x.gguf"],
)
def test_weights_that_were_added_are_named(name: str, added: str, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    (folder / added).write_text("{}")
    for read in READERS[name]:
        with pytest.raises(CheckpointError, match=f"{added}.*does not know it"):
            read(folder)
    assert any(added in problem for problem in verify_checkpoint(folder).problems)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("gone", ["tokenizer.json", "generation_config.json"])
def test_a_file_that_is_gone_is_named(name: str, gone: str, copied: Callable[[str], Path]) -> None:
    folder = copied(name)
    (folder / gone).unlink()
    for read in READERS[name]:
        with pytest.raises(CheckpointError, match=f"{gone}.*is not there"):
            read(folder)


def test_what_only_people_read_may_come_and_go(copied: Callable[[str], Path]) -> None:
    folder = copied("packed")
    (folder / "README.md").unlink()
    (folder / "notes.txt").write_text("mine")
    for read in READERS["packed"]:
        read(folder)


@pytest.mark.parametrize("said", [False, "held"])
def test_no_file_says_that_it_is_not_to_be_checked(said: object, copied: Callable[[str], Path]) -> None:
    folder = copied("packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["check"] = said
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="says whether it is to be checked"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "content", ["{}", '{"a": 1}', "tokenizer.json", '{"format": 1}', '{"format": 1, "checksums": {}}']
)
def test_an_emptied_manifest_is_damage(content: str, copied: Callable[[str], Path]) -> None:
    folder = copied("hf")
    (folder / "sparsify.json").write_text((folder / content).read_text() if content.endswith(".json") else content)
    with pytest.raises(CheckpointError, match=r"nothing of what sparsify writes|no checksums in it"):
        open_source(folder)


@pytest.mark.parametrize("packed", [True, False])
def test_without_a_manifest_nan_is_looked_for(packed: bool, copied: Callable[[str], Path]) -> None:
    folder = copied("packed")
    (folder / "sparsify.json").unlink()
    assert from_pretrained(folder) is not None
    tensors = load_file(folder / "model.safetensors")
    packed_too = {
        name.removesuffix("_meta").removesuffix("_mask") for name in tensors if name.endswith(("_meta", "_mask"))
    }
    name = next(n for n, t in tensors.items() if t.is_floating_point() and (n in packed_too) == packed)
    tensors[name].view(-1)[0] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attn_implementation": "evil-org/kernel"}, "names code to fetch"),
        ({"_attn_implementation": "evil-org/kernel"}, "names code to fetch"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps NaN"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor NaN"),
        ({"model_type": "mamba"}, "model_type mamba and architecture LlamaForCausalLM"),
    ],
)
def test_configs_that_contradict_or_ask_for_code(
    change: dict[str, Any], says: str, copied: Callable[[str], Path]
) -> None:
    folder = copied("dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=says):
        open_source(folder)


def test_a_generation_config_that_is_none(copied: Callable[[str], Path]) -> None:
    folder = copied("dense")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config"):
        open_source(folder)


@pytest.mark.parametrize("store", [5, lambda: None, lambda folder, ledger: 5, lambda folder, ledger: 1 / 0])
def test_a_store_of_another_package_that_fails_is_left_out(
    store: Any, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import EntryPoint

    entry, real = EntryPoint("theirs", "their_package:store", "sparsify.stores"), stores.loaded
    monkeypatch.setattr(stores, "loaded", lambda group: [("theirs", entry, store), *real(group)])
    with pytest.warns(RuntimeWarning, match="'their_package' brings it"):
        assert open_source(copied("packed")).weights is not None


@pytest.mark.parametrize("text", ["٢:٤", "٥٠%", "٠.٥"])
def test_digits_of_other_scripts_are_no_pattern(text: str) -> None:
    with pytest.raises(SpecError):
        parse_pattern(text)


def test_rounds_without_end() -> None:
    with pytest.raises(SpecError, match="more than 1000"):
        parse_pass("llm-pruner:25%,steps=1000000")


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no name for a folder"):
        check_output(tmp_path / "\udcff", overwrite=False, source=None)


def test_no_place_for_temporary_files(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(BackendError, match="Name one in TMPDIR"):
        sparsify.compile(made / "dense", ["llm-pruner:25%,importance=l1"], output=tmp_path / "out")
