"""Every refusal of calibration data: the message says what was found."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.families import build, save
from support.tokenizers import of_bytes
from torch import nn

from sparsify.data import generate, sources
from sparsify.data.batches import load_calibration
from sparsify.data.pictures import images
from sparsify.data.sources import Documents, read_documents
from sparsify.data.windows import random_windows
from sparsify.errors import CalibrationError
from sparsify.evaluation.evaluate import evaluate
from sparsify.frontend.source import Source, open_source


@pytest.fixture(scope="module")
def llama() -> Source:
    return open_source(build("llama"))


class Hub:
    """Stands for ``datasets`` and the hub's client, whatever is asked of them."""

    def __init__(self, columns: dict[str, list[Any]] | None) -> None:
        self.columns = columns

    def load_dataset(self, *names: Any, **more: Any) -> Any:
        if self.columns is None:
            raise RuntimeError("no such configuration\nand a long trace")
        return Rows(self.columns)


class Rows:
    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def __len__(self) -> int:
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}

    def select_columns(self, names: list[str]) -> Rows:
        return Rows({name: self.columns[name] for name in names})


def test_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_require_hub", lambda spec, name: None)
    monkeypatch.setitem(sys.modules, "datasets", Hub({"text": ["a"], "body": ["b"]}))
    assert list(read_documents("some/set", "calibration").documents) == ["a"]
    assert list(read_documents("some/set:en:train:body", "calibration").documents) == ["b"]
    for spec, split, label in (
        ("some/set", "calibration", "some/set (split train, field text)"),
        ("some/set", "heldout", "some/set (split test, field text)"),
        ("some/set:en:dev:body", "heldout", "some/set (configuration en, split dev, field body)"),
    ):
        assert read_documents(spec, split).label == label  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"columns text, body\. Name one: some/set:en:train:FIELD"):
        read_documents("some/set:en::other", "calibration")
    monkeypatch.setitem(sys.modules, "datasets", Hub(None))
    with pytest.raises(CalibrationError, match=r"does not load \(no such configuration\)"):
        read_documents("some/set", "calibration")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="datasets package is not installed"):
        read_documents("some/set", "calibration")


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="a folder"):
        read_documents(str(tmp_path), "calibration")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CalibrationError, match="a text file has no fields"):
        read_documents(f"{tmp_path}/a.txt:body", "calibration")
    save_file({"one": torch.arange(3), "two": torch.arange(3)}, tmp_path / "two.safetensors")
    for name in ("", ":three"):
        with pytest.raises(CalibrationError, match=r"tensors one, two\. Name one of them"):
            read_documents(f"{tmp_path}/two.safetensors{name}", "calibration")
    assert len(read_documents(f"{tmp_path}/two.safetensors:two", "calibration").documents) == 1
    save_file({"one": torch.arange(3)}, tmp_path / "one.safetensors")
    assert len(read_documents(f"{tmp_path}/one.safetensors", "calibration").documents) == 1
    for bad in (torch.zeros(3), torch.zeros(1, 1, 1, dtype=torch.long)):
        save_file({"x": bad}, tmp_path / "bad.safetensors")
        with pytest.raises(CalibrationError, match="Token ids are whole numbers"):
            read_documents(f"{tmp_path}/bad.safetensors", "calibration")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(CalibrationError, match="pyarrow is not installed"):
        read_documents(f"{tmp_path}/a.parquet", "calibration")


def test_a_column_that_a_parquet_file_has_not(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match="body"):
        read_documents(f"{tmp_path}/a.parquet:body", "calibration")


def test_fewer_whole_sequences_than_were_asked_for() -> None:
    documents = Documents("x", [torch.arange(4)] * 3, fixed=True)
    with pytest.raises(CalibrationError, match="4 samples of 4 tokens from x: 3 sequences of 4 tokens"):
        random_windows(documents, lambda text, special=True: torch.empty(0), 4, 4, 0)


def test_batches_given_in_python(llama: Source) -> None:
    for batches, says in (
        ([torch.zeros(2, 4)], "token ids are whole numbers"),
        ([torch.zeros(2, 4, 4, dtype=torch.long)], "token ids are whole numbers"),
        ([{"inputs_embeds": torch.full((1, 4, 32), torch.nan)}], "NaN or infinity"),
        ([{"inputs_embeds": torch.full((1, 4, 32), torch.inf)}], "NaN or infinity"),
        ([torch.full((1, 4), 64)], "vocabulary has 64 tokens"),
        ([torch.full((1, 4), -1)], "token id -1 of calibration batch 0: a negative number, .* Ids count from 0"),
    ):
        with pytest.raises(CalibrationError, match=says):
            load_calibration(batches, llama)
    load_calibration([torch.full((1, 4), 63)], llama)


def test_inputs_that_do_not_share_their_first_axis() -> None:
    net = open_source(nn.Linear(4, 4))
    uneven = [{"0": torch.zeros(2, 4), "1": torch.zeros(3, 4)}, {"0": torch.zeros(1, 4), "1": torch.zeros(3, 4)}]
    with pytest.raises(CalibrationError, match="different sizes with inputs that do not share their first axis"):
        load_calibration(uneven, net)
    with pytest.raises(CalibrationError, match=r"first axes differ: \[2, 3\]"):
        load_calibration(uneven[:1], net, rows=1)


def test_random_ids_need_a_vocabulary() -> None:
    model = build("llama")
    model.config.vocab_size = 0
    with pytest.raises(CalibrationError, match="a config without vocab_size"):
        load_calibration("random", open_source(model), samples=1, sequence_length=4)


def test_sampling_needs_room_for_the_model(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "os", SimpleNamespace(sysconf=lambda name: 100))
    with pytest.raises(CalibrationError, match=r"needs the whole model in memory \(0\.0 GB; 0\.0 GB are free\)"):
        load_calibration("self", open_source(folder("llama")), samples=1, sequence_length=4)
    assert os.sysconf("SC_PAGE_SIZE") > 100


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    pytest.importorskip("PIL")
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for name, size in (("a", (32, 32)), ("b", (32, 48))):
        Image.new("RGB", size, (9, 90, 200)).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path / "pictures"


def test_images(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save("vit", tmp_path / "model")
    (model / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(CalibrationError, match="the image processor of model"):
        load_calibration(str(pictures), open_source(model), samples=2)

    def as_it_is(given: list[Any], return_tensors: str) -> dict[str, list[torch.Tensor]]:
        return {"pixel_values": [torch.zeros(3, *reversed(given[0].size))]}

    monkeypatch.setattr(images, "image_processor", lambda source: as_it_is)
    with pytest.raises(CalibrationError, match=r"sizes \[\(3, 32, 32\), \(3, 48, 32\)\]"):
        load_calibration(str(pictures), open_source(model), samples=2)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CalibrationError, match="no pillow"):
        load_calibration(str(pictures), open_source(model), samples=2)


def test_a_token_that_has_no_embedding(tmp_path: Path) -> None:
    """Text whose token the model has none for: the ids are the folder's own, of a tokenizer with more tokens."""
    folder = save("llama", tmp_path / "model")
    of_bytes().save_pretrained(folder)
    (tmp_path / "a.txt").write_text("~" * 999)
    (tmp_path / "ids.jsonl").write_text('{"text": [1, 2, 999999, 3, 4, 5, 6, 7, 8, 9]}')
    says = (
        r"token id \d+ of {}: the model's vocabulary has 64 tokens, and its own tokenizer has 262: .* token '~'\. Take"
    )
    with pytest.raises(CalibrationError, match=says.format("calibration batch 0")):
        load_calibration(f"{tmp_path}/a.txt", open_source(folder), samples=2, sequence_length=8)
    with pytest.raises(CalibrationError, match=says.format("the data")):
        evaluate(folder, f"{tmp_path}/a.txt", sequence_length=8)
    other = r"token id 999999 of .*: the model's vocabulary has 64 tokens\. The ids are of another tokenizer"
    with pytest.raises(CalibrationError, match=other):
        load_calibration(f"{tmp_path}/ids.jsonl", open_source(folder), samples=1, sequence_length=8)
