"""What a user may name as the model, and what is refused before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.families import build
from torch import nn

from sparsify.errors import CheckpointError, TraceError
from sparsify.frontend.building.bounds import MAX_LAYERS_UNSEEN, check_config
from sparsify.frontend.source import Source, open_source, require_real


def pickled(folder: Path, place: str) -> None:
    """A llama in pickles of which the index says that they lie at ``place``."""
    model = build("llama")
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / place).parent.mkdir(exist_ok=True, parents=True)
    torch.save(model.state_dict(), folder / place)
    table = dict.fromkeys(model.state_dict(), place)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))


def test_pickles_beside_their_index_are_read(tmp_path: Path) -> None:
    pickled(tmp_path / "model", "pytorch_model-1.bin")
    source = open_source(tmp_path / "model", allow_bin=True)
    assert torch.equal(source.weights.read("lm_head.weight"), build("llama").lm_head.weight)


@pytest.mark.parametrize("place", ["../elsewhere.bin", "sub/pytorch_model.bin"])
def test_an_index_of_pickles_may_not_leave_the_folder(tmp_path: Path, place: str) -> None:
    pickled(tmp_path / "model", place)
    with pytest.raises(CheckpointError):
        open_source(tmp_path / "model", allow_bin=True)


def test_an_index_may_not_name_an_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    pickled(tmp_path / "model", str(tmp_path / "elsewhere.bin"))
    with pytest.raises(CheckpointError):
        open_source(tmp_path / "model", allow_bin=True)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["x"]}, {"weight_map": {"lm_head.weight": 1}}])
def test_an_index_of_pickles_without_a_table(tmp_path: Path, index: dict[str, Any]) -> None:
    build("llama").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"bin\.index\.json: no weight_map in it"):
        open_source(tmp_path, allow_bin=True)


@pytest.mark.parametrize("layers", [MAX_LAYERS_UNSEEN, MAX_LAYERS_UNSEEN + 1, MAX_LAYERS_UNSEEN + 2])
@pytest.mark.parametrize("tensors", [None, 1, MAX_LAYERS_UNSEEN, MAX_LAYERS_UNSEEN + 1])
def test_as_many_layers_as_tensors_and_a_few_in_any_case(layers: int, tensors: int | None) -> None:
    refused = layers > max(MAX_LAYERS_UNSEEN, tensors or 0)
    told = pytest.raises(CheckpointError, match=f"num_hidden_layers {layers}") if refused else nullcontext()
    with told:
        check_config({"text": {"num_hidden_layers": layers}}, tensors, Path("x"))


def of(**config: Any) -> Source:
    module = nn.Linear(2, 2)
    module.config = SimpleNamespace(**config)  # type: ignore[assignment]
    return Source("x", module, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "max_seq_len", "seq_length"])
@pytest.mark.parametrize(("value", "expected"), [(7, 7), (1, 1), (0, None), (-1, None), ("8", None), (None, None)])
def test_the_context_length_is_a_positive_number_or_unknown(key: str, value: Any, expected: int | None) -> None:
    assert of(**{key: value}).context_length == expected


def test_the_first_context_length_that_is_one_counts() -> None:
    assert of(max_position_embeddings=-1, n_positions=9, seq_length=3).context_length == 9
    assert of().context_length is None and of().vocab_size is None
    assert Source("x", nn.Linear(2, 2), None).context_length is None  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["no/such/folder/here", "./nowhere", "a b", "../x"])
def test_what_is_no_folder_and_no_hub_id(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder\. Check the path"):
        open_source(model)


@pytest.mark.parametrize("model", ["no/such/file.gguf", "nosuch.GGUF"])
def test_a_file_that_is_not_there(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such file\. Check the path|nothing of that name here"):
        open_source(model)


def test_a_folder_whose_model_lies_in_another(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    shutil.copytree(folder("bert"), tmp_path / "0_Transformer")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"some in 0_Transformer/: is .*0_Transformer the model\?"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", 16), ("dtype", {"a": 1}), ("dtype", "float33"), ("dtype", "torch.float32"), ("torch_dtype", "int8")]
    + [("quantization_config", value) for value in ([], "fp8", 8, ["fp8"])],
)
def test_words_of_a_config_that_are_none(key: str, value: Any, tmp_path: Path, folder: Callable[[str], Path]) -> None:
    copy = Path(shutil.copytree(folder("llama"), tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "dtype"} | {key: value}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json of .*: {key} .*, which is no ") as caught:
        open_source(copy)
    assert "object" not in str(caught.value) and "attribute" not in str(caught.value)


def test_a_hub_id_that_cannot_be_had() -> None:
    with pytest.raises(CheckpointError, match="the hub did not give it"):
        open_source("nobody/nothing-of-this-name")


def test_tokenizers(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="a module in memory, which has none"):
        open_source(build("llama")).tokenizer()
    with pytest.raises(CheckpointError, match="no tokenizer files in"):
        open_source(folder("llama")).tokenizer()
    build("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none that loads in"):
        open_source(tmp_path).tokenizer()


def test_what_holds_no_numbers_is_not_searched_for_nan(folder: Callable[[str], Path]) -> None:
    skeleton = open_source(folder("llama")).module
    for module in (skeleton, nn.Linear(2, 2, device="meta")):
        assert open_source(module).module is module


def test_a_module_without_numbers_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    require_real(net[0])
    with pytest.raises(TraceError, match=r"parameter 1\.weight is on the meta device"):
        require_real(net)
