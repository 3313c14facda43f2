"""``history`` in sparsify.json: every run of a folder, what it was given, and nothing that differs between two runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import sparsify as command
from support.families import save
from support.folders import SMALLEST
from support.manifests import edit_manifest

import sparsify
from sparsify.backends.onnx.expand import expand
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.errors import CheckpointError, SpecError
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.ledger import Ledger
from sparsify.files.manifest import read_manifest
from sparsify.frontend.source import open_source
from sparsify.provenance.commands import commands_of
from sparsify.provenance.history import digest_of_sums
from sparsify.provenance.runs import earlier
from sparsify.quality.heldout import with_use

DATA: dict[str, Any] = {"calibration": "random", "samples": 2, "sequence_length": 16}


def history(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_manifest(folder)["history"]
    return found


def tensors(folder: Path) -> str:
    """The digest of what a reader computes of the folder's files, with no code of the history."""
    return digest_of_sums(Checkpoint(folder).digests())


def test_two_prunings_are_both_told(folder: Callable[[str], Path], tmp_path: Path) -> None:
    dense = folder("llama")
    sparsify.compile(dense, ["llm-pruner:50%,importance=l1", "wanda:2:4"], output=tmp_path / "one", **DATA)
    sparsify.compile(tmp_path / "one", "magnitude:75%", only="*down_proj*", output=tmp_path / "two")
    first, second = history(tmp_path / "two")
    assert [first] == history(tmp_path / "one"), "what was told once is not told otherwise"
    assert [own["spec"] for own in first["passes"]] == ["llm-pruner:50%,importance=l1", "wanda:2:4"]
    smaller, wanda = first["passes"]
    assert smaller["parameters"][0] > smaller["parameters"][1] == first["whole"]["numbers"]
    assert wanda["left"] == 0.5 and wanda["error"] > 0 and wanda["pruned"] > 0
    assert first["source"] == {"name": "llama", "weights": tensors(dense)}, "of the dense model, not of the smaller one"
    assert first["calibration"]["data"].startswith("random") and len(first["calibration"]["sha256"]) == 64
    assert first["recipe"]["passes"] == ["llm-pruner:50%,importance=l1", "wanda:2:4"]
    assert first["command"] == second["command"] == "compile" and first["versions"]["torch"] == torch.__version__
    assert second["source"] == {"name": "one", "weights": tensors(tmp_path / "one")}, "and each hangs on the one before"
    assert "calibration" not in second and second["recipe"]["only"] == ["*down_proj*"]


def test_what_is_left_of_the_whole_model_is_counted(folder: Callable[[str], Path], tmp_path: Path) -> None:
    for number, (model, spec, only) in enumerate(
        [(folder("llama"), "magnitude:2:4", ()), (tmp_path / "0", "magnitude:75%", "*down_proj*")]
    ):
        made = sparsify.compile(model, spec, only=only, output=tmp_path / str(number))
        files = Checkpoint(tmp_path / str(number))
        read = [files.read(name) for name in made.program.weights.parameters()]
        every, left = sum(t.numel() for t in read), sum(int((t != 0).sum()) for t in read)
        assert history(tmp_path / str(number))[-1]["whole"] == {"numbers": every, "kept": left / every}


def test_a_module_and_data_in_memory(folder: Callable[[str], Path]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    made = sparsify.compile(net, "wanda:2:4", calibration=[torch.randn(4, 8)])
    (run,) = made.manifest["history"]
    assert "recipe" not in run and len(run["source"]["weights"]) == 64 and run["source"]["name"] == "sequential"
    again = sparsify.compile(made.model, "magnitude:2:4", calibration=[torch.randn(4, 8)])
    assert again.manifest["history"][0]["source"]["weights"] != run["source"]["weights"]


def test_other_forms_hang_on_each_other(folder: Callable[[str], Path], tmp_path: Path) -> None:
    sparsify.compile(folder("llama"), "magnitude:2:4", output=tmp_path / "packed", to=SMALLEST)
    unpack_folder(tmp_path / "packed", tmp_path / "dense")
    sparsify.compile(tmp_path / "dense", "magnitude:75%", output=tmp_path / "last", to="onnx:weights=packed")
    expand(tmp_path / "last", tmp_path / "wide")
    runs = history(tmp_path / "wide")
    assert [run["command"] for run in runs] == ["compile", "unpack", "compile", "expand"]
    for run, given in zip(runs[1:], ("packed", "dense", "last"), strict=True):
        assert run["source"]["weights"] == digest_of_sums(Ledger.of(tmp_path / given).tensors), run


def test_a_folder_from_before_there_was_a_history(folder: Callable[[str], Path], tmp_path: Path) -> None:
    sparsify.compile(folder("llama"), "wanda:2:4", output=tmp_path / "old", **DATA)
    edit_manifest(tmp_path / "old", lambda manifest: [manifest.pop("history"), manifest.pop("card")])
    sparsify.compile(tmp_path / "old", "magnitude:75%", output=tmp_path / "new")
    first, second = history(tmp_path / "new")
    assert [own["spec"] for own in first["passes"]] == ["wanda:2:4"] and first["source"] == {"name": "llama"}
    assert "date" not in first and first["calibration"]["data"].startswith("random"), "what is not known is not said"
    assert second["source"]["name"] == "old"
    tuned = {"tuned": {"data": "x", "perplexity": [2.0, 1.0], "losses": [1.0], "seconds": 3.0}}
    assert earlier(tuned)[0]["data"] == "x" and not {"losses", "seconds"} & earlier(tuned)[0].keys()


def test_text_of_an_earlier_step_is_not_held_out(folder: Callable[[str], Path], tmp_path: Path) -> None:
    made = sparsify.compile(folder("llama"), "wanda:2:4", output=tmp_path / "one", **DATA)
    sparsify.compile(tmp_path / "one", "magnitude:75%", output=tmp_path / "two")
    used = made.manifest["calibration"]["data"]
    assert "not held out" in with_use(used, used, open_source(tmp_path / "two"))
    assert with_use("other", "other", open_source(tmp_path / "two")) == "other"


def test_two_runs_differ_in_the_date_alone(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for number, seconds in enumerate(("1700000000", "1700000000", "1800000000")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", seconds)
        out = tmp_path / str(number)
        sparsify.compile(folder("llama"), "wanda:2:4", output=out, **DATA)
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    one, same, later = made
    assert one == same
    assert {name for name in one if one[name] != later[name]} == {"sparsify.json"}
    early, late = json.loads(one["sparsify.json"]), json.loads(later["sparsify.json"])
    assert (early["history"][0].pop("date"), late["history"][0].pop("date")) == (
        "2023-11-14T22:13:20Z", "2027-01-15T08:00:00Z",
    )  # fmt: skip
    assert early["digests"].pop("manifest") != late["digests"].pop("manifest") and early == late


def test_the_date_is_that_of_the_clock(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    monkeypatch.setattr("time.time", lambda: 86400.9)
    assert sparsify.compile(folder("llama"), "magnitude:2:4").manifest["history"][0]["date"] == "1970-01-02T00:00:00Z"


@pytest.mark.parametrize("seconds", ["soon", "1e9", "9" * 30])
def test_a_date_that_is_none(
    seconds: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", seconds)
    with pytest.raises(SpecError, match="no time"):
        sparsify.compile(folder("llama"), "magnitude:2:4", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_of_the_card_makes_the_same(folder: Callable[[str], Path], tmp_path: Path) -> None:
    words = ["--pass", "llm-pruner:50%,importance=l1", "--pass", "wanda:2:4", "--only", "*proj", "--ignore", "*k_proj"]
    words += [
        "--calibration",
        "random",
        "--samples",
        "2",
        "--sequence-length",
        "16",
        "--seed",
        "3",
        "--schedule",
        "block",
    ]
    words += ["--compute-dtype", "float32", "--strict", "--to", "packed:choice=smallest"]
    done = command("compile", folder("llama"), *words, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("sparsify compile")]
    given = shlex.split(line)
    assert given[-2:] == ["-o", "OUT"]
    done = command(*given[1:-1], tmp_path / "again")
    assert done.returncode == 0, done.stderr
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("out", "again"))
    assert one == two


@pytest.mark.parametrize(
    "planted",
    [
        {"history": 3},
        {"history": [{"passes": []}]},
        {"history": [{"command": "compile", "passes": [{"spec": "x", "left": "a lot"}]}]},
        {"history": [{"command": "tune", "perplexity": [1.0]}]},
        {"history": [{"command": "compile", "source": "me"}]},
        {"card": {"dense": 3}},
    ],
)
def test_a_history_of_another_form_is_refused(planted: dict[str, Any], tmp_path: Path) -> None:
    dense = save("llama", tmp_path / "dense")
    sparsify.compile(dense, "magnitude:2:4", output=tmp_path / "out")
    edit_manifest(tmp_path / "out", lambda manifest: manifest.update(planted))
    with pytest.raises(CheckpointError, match=r"history|card"):
        sparsify.compile(tmp_path / "out", "magnitude:75%")


def test_each_command_writes_what_the_next_one_reads() -> None:
    runs = [
        {"command": "compile", "recipe": {"model": "dense", "passes": ["wanda:2:4"]}},
        {"command": "tune", "recipe": {"model": "my pruned", "data": "t.txt"}},
        {"command": "unpack"},
    ]
    assert commands_of(runs) == [
        "sparsify compile dense --pass wanda:2:4 -o 'my pruned'",
        "sparsify tune 'my pruned' --data t.txt -o OUT",
        "sparsify unpack FOLDER -o OUT",
    ]
    assert commands_of([]) == []
