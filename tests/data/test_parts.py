"""What serves for calibration and evaluation is shared out: no window of one overlaps a window of the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import sparsify as command
from support.families import deep
from torch import Tensor

import sparsify
from sparsify.data import parts
from sparsify.data.parts import Documents, Slice, part_of
from sparsify.data.rows import TokenRows
from sparsify.data.sources import read_documents, same_source
from sparsify.data.texts import LongText, text_in_memory
from sparsify.data.windows import disjoint_windows, random_windows
from sparsify.evaluation.compare import compare
from sparsify.evaluation.evaluate import evaluate
from sparsify.tuning.recipe import Recipe


def numbered(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count)


def letters(text: str, special: bool = True) -> Tensor:
    return torch.tensor([ord(c) for c in text], dtype=torch.long)


SOURCES: dict[str, Documents] = {
    "ids": Documents("x", [numbered(0, 1000)]),
    "rows": Documents("x", TokenRows(numbered(0, 64 * 16).view(64, 16)), fixed=True),
    "few": Documents("x", [numbered(0, 700), numbered(700, 40), numbered(740, 3)]),
    "many": Documents("x", [numbered(i * 50, 50) for i in range(40)]),
    "conversations": Documents("x", [numbered(i * 20, 20) for i in range(60)], packed=True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_no_window_is_in_both(name: str) -> None:
    """Every id stands once in the source: drawn from as often as it takes to see all of it, none is held out."""
    one, other = (part_of(SOURCES[name], split) for split in ("calibration", "heldout"))
    count = len(one.documents) if one.fixed else 60
    trained = torch.cat([random_windows(one, letters, count, 16, seed) for seed in range(5)])
    held = disjoint_windows(other, letters, 16 if name != "few" else 8)
    assert not set(trained.flatten().tolist()) & set(held.flatten().tolist())
    assert int(held.min()) > int(trained.max()), "what is held out comes last"
    whole = sum(map(len, SOURCES[name].documents))
    assert sum(map(len, (*one.documents, *other.documents))) == whole, "and all of it is used"
    assert 0.03 < sum(map(len, other.documents)) / whole < 0.2
    assert "first 90%" in one.label and "last 10%, held out" in other.label


@pytest.mark.parametrize("between", ["\n", " ", "", "é", "€"])
@pytest.mark.parametrize("long", [False, True])
def test_text_is_cut_between_lines_or_words(between: str, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if long:
        monkeypatch.setattr("sparsify.data.texts.WHOLE", 500)
        monkeypatch.setattr(parts, "WHOLE", 500)
    text = between.join(str(i) for i in range(1000))
    whole = Documents("x", [text_in_memory(text, "x")])
    halves = [part_of(whole, split).documents for split in ("calibration", "heldout")]
    said = ["".join(d.chunks()) if isinstance(d, LongText) else str(d) for (d,) in halves]
    assert "".join(said) == text and 0.85 < len(said[0]) / len(text) < 0.91
    assert isinstance(halves[0][0], LongText) is long
    if between in ("\n", " "):
        assert said[0].endswith("\n") or said[1].startswith(" ")


def test_one_document_among_few_is_held_out_whole_where_it_is_last() -> None:
    one, other = (part_of(Documents("x", ["a " * 90, "b " * 10]), split) for split in ("calibration", "heldout"))
    assert list(one.documents) == ["a " * 90] and list(other.documents) == ["b " * 10]


def test_which_sources_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    for one, other, same in (
        ("c4", "c4", False),
        ("python-stdlib", "python-stdlib", False),
        ("some/set", "some/set", False),
        ("some/set::train", "some/set::train", True),
        ("some/set", "some/set::train", True),
        ("some/set:en:train", "some/set::train", False),
        (f"{tmp_path}/a.txt", f"{tmp_path}/link.txt", True),
        (f"{tmp_path}/a.txt:one", f"{tmp_path}/a.txt:two", True),
        (f"{tmp_path}/a.txt", "c4", False),
        (str(tmp_path), str(tmp_path), True),
    ):
        assert same_source(one, other) is same, (one, other)


def test_files_of_a_folder_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "b.txt").write_text("b" * 50)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "a" * 40}) for _ in range(12)))
    (tmp_path / "deeper" / "c.txt").write_text("c" * 60)
    for name in ("picture.png", "set.py", "README.md"):
        (tmp_path / name).write_bytes(b"not the text of this data")
    found = read_documents(str(tmp_path), "calibration")
    assert (
        found.files == (("a.jsonl", 12), ("b.txt", 1), ("deeper/c.txt", 1)) and found.label == f"{tmp_path} (3 files)"
    )
    assert [str(d)[0] for d in found.documents] == ["a"] * 12 + ["b", "c"]
    held = read_documents(str(tmp_path), "heldout", both=True)
    assert isinstance(held.documents, Slice) and list(held.documents) == ["b" * 50, "c" * 60]
    assert held.files == (("a.jsonl", 0), ("b.txt", 1), ("deeper/c.txt", 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    deep("llama", 1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder_of_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, first in (("a", 3), ("b", 30)):
        save_file({"ids": torch.arange(600) % 25 + first}, folder / f"{name}.safetensors")
    return folder


def test_what_was_drawn_from_where(model: Path, folder_of_ids: Path, tmp_path: Path) -> None:
    done = command("compile", model, "--pass", "wanda:2:4", "--calibration", folder_of_ids, "--samples", 10,
                   "--sequence-length", 16, "-o", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "out" / "sparsify.json").read_text())["calibration"]
    assert sum(said["drawn"].values()) == 10 and set(said["drawn"]) <= {"a.safetensors", "b.safetensors"}
    told = " ".join(done.stdout.split())
    assert all(f"{count} of {name}" in told for name, count in said["drawn"].items()), told


def test_eval_says_what_a_model_was_made_with(model: Path, folder_of_ids: Path, tmp_path: Path) -> None:
    one, other = f"{folder_of_ids}/a.safetensors", f"{folder_of_ids}/b.safetensors"
    sparsify.compile(model, ["wanda:2:4"], calibration=one, samples=4, sequence_length=16, output=tmp_path / "out")
    same = evaluate(tmp_path / "out", one, sequence_length=16).data
    assert same.endswith("(on which the model was calibrated: not held out)")
    assert "not held out" not in evaluate(tmp_path / "out", other, sequence_length=16).data
    assert "not held out" not in evaluate(model, one, sequence_length=16).data


def test_compare_takes_two_files_as_they_are(model: Path, folder_of_ids: Path) -> None:
    """(How it shares one out: tests/evaluation/test_compare.py.)"""
    one, other = f"{folder_of_ids}/a.safetensors", f"{folder_of_ids}/b.safetensors"
    apart = compare(model, ["wanda:2:4"], calibration=one, data=other, samples=4, sequence_length=16)
    assert "90%" not in apart.calibration and "10%" not in str(apart.data)


def test_tune_shares_a_file_out_or_validates_on_another(model: Path, folder_of_ids: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from sparsify.tuning.tune import tune

    one, other = f"{folder_of_ids}/a.safetensors", f"{folder_of_ids}/b.safetensors"
    recipe = Recipe(steps=1, batch=2, micro=2, samples=4, length=16)
    shared = tune(model, one, tmp_path / "shared", recipe)
    assert shared.data.endswith("a.safetensors:ids (its first 90%)")
    assert shared.validation.endswith("a.safetensors:ids (its last 10%, held out)")
    assert "(on which the model was tuned" in evaluate(tmp_path / "shared", one, sequence_length=16).data
    apart = tune(model, one, tmp_path / "apart", recipe, validation=other)
    assert apart.data.endswith("a.safetensors:ids") and apart.validation.endswith("b.safetensors:ids")
