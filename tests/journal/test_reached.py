"""``--checkpoint-every``: a run that goes on begins where activations were kept, and ends with the same bytes."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import deep
from support.interrupted import IDS, content, hidden, interrupted_after

import sparsify
from sparsify.calibration.interpreter import Interpreter
from sparsify.errors import BackendError, CheckpointError, ProcessError, SpecError
from sparsify.journal import reached as module
from sparsify.journal.journal import Journal, Kept
from sparsify.journal.left import left_in, left_of
from sparsify.journal.reached import REACHED, Reached
from sparsify.world.world import ALONE, World

BLOCKS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("models")

    def model(family: str) -> Path:
        if not (place / family).exists():
            deep(family, BLOCKS).save_pretrained(place / family)
        return place / family

    return model


def regions_of(run: Callable[[], Any]) -> int:
    """How many regions a run ran, over all batches, of both streams."""
    count, real = [0], Interpreter.run_region

    def run_region(self: Interpreter, *given: Any, **words: Any) -> None:
        count[0] += 1
        real(self, *given, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interpreter, "run_region", run_region)
        run()
    return count[0]


CASES: list[tuple[str, list[str], dict[str, Any]]] = [
    ("llama", ["twin:2:4"], {}),
    ("mixtral", ["wanda:2:4"], {"schedule": "block"}),
    ("opt", ["sparsegpt:2:4"], {"schedule": "dense"}),
    ("llama", ["wanda:2:4", "round:int4"], {"memory": "1KiB"}),
    ("gpt2", ["sparsegpt:50%"], {}),
    ("mixtral", ["twin:2:4"], {"compute_dtype": "bfloat16"}),
]


@pytest.mark.first(2)
@pytest.mark.parametrize(("family", "passes", "options"), CASES)
def test_what_was_run_is_not_run_again(
    family: str, passes: list[str], options: dict[str, Any], models: Callable[[str], Path], tmp_path: Path
) -> None:
    model, given = models(family), {"calibration": IDS, **options}
    with interrupted_after(0) as parts:
        whole = regions_of(lambda: sparsify.compile(model, passes, output=tmp_path / "whole" / "out", **given))
    each = parts[0] // (BLOCKS * len(passes))
    # In the last block; at the end of the third, before its activations are kept; in the second.
    for at, blocks in ((parts[0] - 1, BLOCKS - 1), (parts[0] - each, BLOCKS - 2), (parts[0] - 2 * each - 1, 1)):
        out = tmp_path / str(at) / "out"
        with interrupted_after(at), pytest.raises(KeyboardInterrupt):
            sparsify.compile(model, passes, output=out, checkpoint_every=1, **given)
        # Asked for or not: what is there is taken.
        again = regions_of(
            lambda out=out: sparsify.compile(model, passes, output=out, resume=True, **given)  # type: ignore[misc]
        )
        assert content(out) == content(tmp_path / "whole" / "out") and not hidden(out.parent)
        last = whole / len(passes)
        assert again <= last * (1 - (blocks - 0.5) / BLOCKS), (at, again, whole)


def test_blocks_that_are_trained_begin_where_they_were(models: Callable[[str], Path], tmp_path: Path) -> None:
    model, given = models("llama"), {"calibration": IDS}
    passes = ["magnitude:2:4", "refine:epochs=2,batch=2"]
    with interrupted_after(0) as parts:
        whole = regions_of(lambda: sparsify.compile(model, passes, output=tmp_path / "whole" / "out", **given))
    # What comes before the blocks, and each block but the last of the student, in both models; before them each of four
    # inputs in a block, whose error is measured.
    trained = 2 + 2 * BLOCKS - 1
    assert whole == trained + 4 * BLOCKS
    for at, blocks in ((parts[0] - 1, BLOCKS - 1), (parts[0] - 2, BLOCKS - 2)):
        out = tmp_path / str(at) / "out"
        with interrupted_after(at), pytest.raises(KeyboardInterrupt):
            sparsify.compile(model, passes, output=out, checkpoint_every=1, **given)
        # Interrupted when a block was finished, before what comes of it was kept.
        again = regions_of(
            lambda out=out: sparsify.compile(model, passes, output=out, resume=True, **given)  # type: ignore[misc]
        )
        assert again == trained - 2 - 2 * (blocks - 1)
        assert content(out) == content(tmp_path / "whole" / "out") and not hidden(out.parent)


def test_every_so_many_blocks(models: Callable[[str], Path], tmp_path: Path) -> None:
    kept: list[int] = []
    real = Reached.keep

    def keep(self: Reached, step: int, values: Any) -> None:
        kept.append(step)
        real(self, step, values)
        (journal,) = left_of(tmp_path / "out")
        # The older ones are gone.
        assert len(list(journal.path.glob("reached-*.bin"))) == 1
        size = sum(path.stat().st_size for path in journal.path.iterdir())
        assert journal.size == size and left_in(tmp_path)[0].size >= size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reached, "keep", keep)
        words: dict[str, Any] = {"output": tmp_path / "out", "calibration": IDS}
        sparsify.compile(models("llama"), "wanda:2:4", checkpoint_every=2, **words)
        # Four inputs are measured in a block; none is kept at the end of the last.
        assert kept == [8]
        sparsify.compile(models("llama"), "wanda:2:4", checkpoint_every=4, overwrite=True, **words)
    assert kept == [8] and not hidden(tmp_path)


def interrupted(model: Path, out: Path) -> Path:
    """The journal of a run that was interrupted after its third block."""
    with interrupted_after(7 * (BLOCKS - 1) + 1), pytest.raises(KeyboardInterrupt):
        sparsify.compile(model, "wanda:2:4", output=out, calibration=IDS, checkpoint_every=1)
    return left_of(out)[0].path


@pytest.mark.parametrize("what", ["bytes", "missing", "index", "parts"])
def test_what_is_damaged_is_refused(what: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = interrupted(models("llama"), out)
    (values,) = folder.glob("reached-*.bin")
    if what == "bytes":
        told = bytearray(values.read_bytes())
        told[len(told) // 2] ^= 1
        values.write_bytes(told)
    elif what == "missing":
        values.unlink()
    elif what == "index":
        (folder / REACHED).write_text((folder / REACHED).read_text().replace('"step": 12', '"step": 11'))
    else:
        lines = (folder / "journal.jsonl").read_text().splitlines(keepends=True)
        (folder / "journal.jsonl").write_text("".join(lines[:5]))
    found = {"bytes": "not those that were written", "missing": "cannot be read", "index": "not what was written"}
    with pytest.raises(CheckpointError, match=found.get(what, "which is not finished")):
        sparsify.compile(models("llama"), "wanda:2:4", output=out, calibration=IDS, resume=True)
    assert not out.exists()


def test_a_full_disk_costs_no_part(models: Callable[[str], Path], tmp_path: Path) -> None:
    out, real, count = tmp_path / "out", module.write_from, [0]

    def write_from(fd: int, tensor: torch.Tensor, offset: int) -> None:
        count[0] += 1
        # In the middle of what is kept after the second block.
        if count[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, tensor, offset)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(RuntimeWarning, match="finished parts of this run are kept"),
        pytest.raises(BackendError, match=r"activations cannot be written .*No space left"),
    ):
        patch.setattr(module, "write_from", write_from)
        sparsify.compile(models("llama"), "wanda:2:4", output=out, calibration=IDS, checkpoint_every=1)
    folder = left_of(out)[0].path
    # What was kept after the first block is still there, and nothing else.
    assert [path.name for path in folder.glob("reached-*.bin")] == ["reached-0-4-0.bin"]
    sparsify.compile(models("llama"), "wanda:2:4", output=out, calibration=IDS, checkpoint_every=1, resume=True)
    sparsify.compile(models("llama"), "wanda:2:4", output=tmp_path / "whole", calibration=IDS)
    assert content(out) == content(tmp_path / "whole") and not hidden(tmp_path)


def test_values_come_back_as_they_lay(tmp_path: Path) -> None:
    base = torch.randn(3, 5, 4)
    values = {
        "plain": base,
        "turned": base.permute(2, 0, 1),
        "once for all": base[:, :1, :1].expand(3, 5, 4),
        "numbers": torch.randn(4).bfloat16(),
        "none": torch.empty(0, 3),
        "one": torch.tensor(7),
        "several": [base[0], (base[1], 3, None)],
        "number": 2.5,
    }
    with Journal(tmp_path / "out", {"of": "a test"}) as journal:
        kept = Kept(0, journal, 1)
        kept.add("a part", {}, {})
        Reached(kept, ALONE).keep(3, ((("pruned", 0, name), value) for name, value in values.items()))
        found = Reached(kept, ALONE).load()
        assert found is not None and found[0] == 3
        back = {key[-1]: value for key, value in found[1]}
        # Another pass has not come so far.
        assert Reached(Kept(1, journal, 1), ALONE).load() is None
        said = json.loads((journal.folder / REACHED).read_text()[33:])
        assert said["step"] == 3
        with pytest.raises(SpecError, match="a set between two blocks"):
            Reached(kept, ALONE).keep(4, [(("pruned", 0, "odd"), {1})])
    assert list(back) == list(values)
    for name in ("plain", "turned", "once for all", "numbers", "none", "one"):
        ours, theirs = back[name], values[name]
        assert ours.equal(theirs) and ours.dtype == theirs.dtype, name
        # What is the same along an axis is kept once.
        once = name == "once for all"
        assert [s == 0 for s in ours.stride()] == [s == 0 for s in theirs.stride()], name
        assert once or ours.stride() == theirs.stride(), name
    first, (second, *others) = back["several"]
    assert first.equal(base[0]) and second.equal(base[1]) and others == [3, None] and isinstance(back["several"], list)
    assert back["number"] == 2.5


class Blind(World):
    """The first of two processes, of which the second sees another disk."""

    size = 2

    def told(self, word: Any) -> list[Any]:
        return [word, "No such file or directory"]


def test_processes_that_do_not_see_the_folder_are_named(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "out", {"of": "a test"}) as journal,
        pytest.raises(ProcessError, match=r"--checkpoint-every by 2 processes.*process 1 does not see"),
    ):
        Reached(Kept(0, journal, 1), Blind())


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ({"checkpoint_every": 0}, "no number of blocks"),
        ({"checkpoint_every": True}, "no number of blocks"),
        ({"checkpoint_every": 2, "output": None}, "no output"),
        ({"checkpoint_every": 2, "journal": False}, "--no-journal"),
    ],
)
def test_what_keeps_nothing_is_refused(words: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=found):
        sparsify.compile(tmp_path / "none", "wanda:2:4", **{"output": tmp_path / "out", **words})
