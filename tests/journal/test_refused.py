"""What cannot be gone on with is refused, and says what to do; nothing that was finished is lost by it."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import deep
from support.interrupted import IDS, content, interrupted_after

import sparsify
from sparsify.durable import try_lock
from sparsify.errors import BackendError, CheckpointError, SpecError
from sparsify.journal.journal import Journal
from sparsify.journal.left import left_of

Given = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "llama"
    deep("llama", 1).save_pretrained(place)
    return place


@pytest.fixture
def given(model: Path, tmp_path: Path) -> Given:
    """A run that ended after 3 of 7 parts."""
    given: Given = {"model": model, "passes": ["wanda:2:4"], "calibration": IDS, "output": tmp_path / "out"}
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        sparsify.compile(**given)
    return given


def journal(given: Given) -> Path:
    (left,) = left_of(given["output"])
    assert left.finished == 3
    return left.path


def test_nothing_to_go_on_with(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no interrupted run left anything there. Begin without --resume"):
        sparsify.compile(model, "wanda:2:4", calibration=IDS, output=tmp_path / "deep" / "out", resume=True)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("other", [{"output": None}, {"dry_run": True}, {"journal": False}])
def test_words_that_do_not_go_together(other: Given, given: Given) -> None:
    with pytest.raises(SpecError, match="--resume"):
        sparsify.compile(**given | other, resume=True)


OTHERS: dict[str, tuple[Given, str]] = {
    "passes": ({"passes": ["wanda:4:8"]}, r"passes \(wanda:2:4, now wanda:4:8\)"),
    "names of a pass": (
        {"passes": [{"pass": "wanda:2:4", "only": ["*mlp*"]}]},
        r"passes \(wanda:2:4, now wanda:2:4 only \*mlp\*\)",
    ),
    "names": ({"ignore": ["*.q_proj"]}, r"ignore \(none, now \*.q_proj\)"),
    "seed": ({"seed": 1}, r"seed \(0, now 1\)"),
    "schedule": ({"schedule": "block"}, r"schedule \(layer, now block\)"),
    "dtype": ({"compute_dtype": "bfloat16"}, r"compute dtype \(none, now bfloat16\)"),
    "data": ({"calibration": IDS[:1]}, "calibration data"),
    "two": ({"seed": 2, "schedule": "dense"}, r"schedule \(layer, now dense\); seed \(0, now 2\)"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_job(what: str, given: Given) -> None:
    other, said = OTHERS[what]
    kept = content(journal(given))
    with pytest.raises(CheckpointError, match=f"was asked otherwise: {said}. Ask the same again"):
        sparsify.compile(**given | other, resume=True)
    assert content(journal(given)) == kept and not given["output"].exists()


def test_another_model(given: Given, tmp_path: Path) -> None:
    other = deep("llama", 1)
    other.model.norm.weight.data[0] = 2
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="asked otherwise: weights of the model"):
        sparsify.compile(**given | {"model": tmp_path / "other"}, resume=True)
    shutil.copytree(given["model"], tmp_path / "changed")
    config = json.loads((tmp_path / "changed" / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match="asked otherwise: config of the model"):
        sparsify.compile(**given | {"model": tmp_path / "changed"}, resume=True)
    shutil.copytree(given["model"], tmp_path / "elsewhere")
    sparsify.compile(**given | {"model": tmp_path / "elsewhere"}, resume=True)


def test_other_versions(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify.compiler.keeping import job

    monkeypatch.setattr(job, "versions", lambda: {"torch": "99.0"})
    with pytest.raises(CheckpointError, match=r"version of torch \(.*, now 99.0\)"):
        sparsify.compile(**given, resume=True)


def test_the_same_job_anew_is_refused_and_another_is_told(given: Given, tmp_path: Path) -> None:
    kept = content(journal(given))
    with pytest.raises(BackendError, match=r"3 finished parts \(\d+ KiB\) are kept.*--resume.*clean .* --yes"):
        sparsify.compile(**given)
    assert content(journal(given)) == kept and not given["output"].exists()
    with pytest.warns(RuntimeWarning, match="an earlier run to .*out was interrupted: 3 finished parts"):
        sparsify.compile(**given | {"passes": ["magnitude:2:4"]})
    assert content(journal(given)) == kept and given["output"].exists()
    with pytest.raises(BackendError, match="it exists already"):
        sparsify.compile(**given, resume=True)
    result = sparsify.compile(**given, resume=True, overwrite=True)
    assert result.manifest["passes"][0]["name"] == "wanda" and not left_of(given["output"])


def test_the_same_command_is_refused_before_anything_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Given = {"model": model, "passes": ["wanda:2:4"], "calibration": "random", "output": tmp_path / "out"}
    given |= {"samples": 2, "sequence_length": 16}
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        sparsify.compile(**given)
    from sparsify.compiler import stages

    monkeypatch.setattr(stages, "load_calibration", None)
    with pytest.raises(BackendError, match="this very job was interrupted: 3 finished parts"):
        sparsify.compile(**given)


def cut_short(folder: Path) -> None:
    with (folder / "tensors.bin").open("r+b") as file:
        file.truncate(100)


def another_byte(folder: Path) -> None:
    with (folder / "tensors.bin").open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))


def gone(folder: Path) -> None:
    (folder / "tensors.bin").unlink()


def another_line(folder: Path) -> None:
    path = folder / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"kept": 0.5', b'"kept": 0.4', 1))


def no_line(folder: Path) -> None:
    path = folder / "journal.jsonl"
    path.write_bytes(b"\0\xff\n" + path.read_bytes())


DAMAGES = (cut_short, another_byte, gone, another_line, no_line)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(damage: Callable[[Path], None], given: Given) -> None:
    damage(journal(given))
    with pytest.raises(CheckpointError, match=r"Remove it .sparsify clean .* --yes. and begin without --resume"):
        sparsify.compile(**given, resume=True)
    assert not given["output"].exists()


def test_damage_to_a_smaller_model(model: Path, tmp_path: Path) -> None:
    given: Given = {"model": model, "passes": ["llm-pruner:25%,importance=l1", "wanda:50%"], "calibration": IDS}
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        sparsify.compile(**given, output=tmp_path / "out")
    (left,) = left_of(tmp_path / "out")
    (smaller,) = left.path.glob("smaller-*")
    with (smaller / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    with pytest.raises(CheckpointError, match=r"smaller-0-0/model.safetensors is not what was written"):
        sparsify.compile(**given, output=tmp_path / "out", resume=True)


@pytest.mark.parametrize("end", [b"", b"0123", b"0" * 32 + b' {"pass": 0}\n'])
def test_a_last_line_that_was_cut_off_is_not_there(end: bytes, given: Given, tmp_path: Path) -> None:
    """And neither are the bytes that came before it."""
    folder = journal(given)
    for name, more in (("journal.jsonl", end), ("tensors.bin", b"half a tensor")):
        with (folder / name).open("ab") as file:
            file.write(more)
    with interrupted_after(0) as parts:
        sparsify.compile(**given, resume=True)
    assert parts == [4]
    sparsify.compile(**given | {"output": tmp_path / "whole"})
    assert content(given["output"]) == content(tmp_path / "whole")


def test_two_at_one_job(given: Given) -> None:
    fd = os.open(journal(given), os.O_RDONLY)
    assert try_lock(fd)
    for resume in (True, False):
        with pytest.raises(BackendError, match="another process is at this job now"):
            sparsify.compile(**given, resume=resume)
    os.close(fd)
    sparsify.compile(**given, resume=True)


def test_a_full_disk(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a tensor; once there is space again the run goes on."""
    from sparsify.journal import record

    real, left = record.write_from, [2]

    def write_from(fd: int, tensor: torch.Tensor, offset: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            real(fd, tensor[: len(tensor) // 2].contiguous(), offset)
            raise OSError(28, "No space left on device")
        real(fd, tensor, offset)

    monkeypatch.setattr(record, "write_from", write_from)
    with (
        pytest.warns(RuntimeWarning, match="5 finished parts of this run are kept"),
        pytest.raises(BackendError, match=r"No space left on device.*--resume"),
    ):
        sparsify.compile(**given, resume=True)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    monkeypatch.setattr(record, "write_from", real)
    with interrupted_after(0) as parts:
        sparsify.compile(**given, resume=True)
    sparsify.compile(**given | {"output": tmp_path / "whole"})
    assert parts == [2] and content(given["output"]) == content(tmp_path / "whole")


def test_no_room_is_told_before_the_pruning(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    # The output's room, then the journal's.
    free = iter([10**12, 1000])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, next(free)))
    other: Given = {**given, "output": given["output"].with_name("other")}
    with (
        interrupted_after(0) as parts,
        pytest.raises(BackendError, match=r"1 KiB free, \d+ KiB needed beside.*--no-journal"),
    ):
        sparsify.compile(**other)
    assert parts == [0] and not left_of(other["output"])


def test_a_place_where_no_journal_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"no journal can be kept beside it.*--no-journal"):
        Journal(tmp_path / "file" / "out", {})


def test_words_that_cannot_be_meant_leave_nothing(model: Path, tmp_path: Path) -> None:
    """Found once a pass has run: the next run will be asked otherwise."""
    with interrupted_after(0) as parts, pytest.raises(SpecError, match="no linear weight in its blocks has zeros"):
        sparsify.compile(model, "twin:2:4+refine", calibration=IDS, output=tmp_path / "out", only=["lm_head"])
    assert parts == [1] and not [*tmp_path.iterdir()]
