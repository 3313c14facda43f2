"""Kills, races and threads: an output is the older one or the new one, whole, and who loses is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import deep

import sparsify
from sparsify.files.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]


def kills(writers: str) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "kills", "--json", "--writers", writers],
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_killed_at_every_call_of_the_commit() -> None:
    """Of what all writers share, and of single files, the cache and the state of tuning; the writers are below."""
    series = kills("staging,file,cache,state")
    assert len(series) == 4 + 2 + 2 + 4 and sum(int(str(s["kills"])) for s in series) > 100
    assert all(s["old"] and s["new"] for s in series)


@pytest.mark.slow
def test_killed_at_every_call_of_a_whole_command() -> None:
    """Of one writer; `python tools/kills` goes through all of them, which takes the better part of an hour."""
    series = kills("unpack")
    assert sum(int(str(s["kills"])) for s in series) > 10 and all(s["old"] and s["new"] for s in series)


RACER = """
import sys, time
from pathlib import Path
from sparsify.errors import BackendError
from sparsify.files.staging import Staging
place, number, overwrite, rounds = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", int(sys.argv[4])
(place / f"ready{number}").touch()
while len(list(place.glob("ready*"))) < 2:
    time.sleep(0.001)
for i in range(rounds):
    try:
        with Staging(place / "outs" / str(i), overwrite=overwrite) as staging:
            for name in ("a", "b", "sparsify.json"):
                (staging.folder / name).write_text(number)
            staging.commit()
        print("won", flush=True)
    except BackendError as error:
        print("told:", error.found, flush=True)
"""


def start(code: str, *words: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_race_for_one_output(tmp_path: Path, overwrite: bool) -> None:
    """A hundred times: one wins and the other is told; with --overwrite both may, one after the other."""
    racers = [start(RACER, tmp_path, number, overwrite, 100) for number in (1, 2)]
    said = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], said
    first, second = (text.splitlines() for text, _ in said)
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        out = tmp_path / "outs" / str(i)
        whose = {(out / name).read_text() for name in ("a", "b", "sparsify.json")}
        assert len(whose) == 1 and len([*out.iterdir()]) == 3
        wins = [one, other].count("won")
        assert wins == 1 if not overwrite else wins in (1, 2)
        if wins == 1:
            assert whose == {"1" if one == "won" else "2"}
            loser = other if one == "won" else one
            assert loser in ("told: another job is writing it now", "told: it exists already")
    assert not [p for p in (tmp_path / "outs").iterdir() if p.name.startswith(".")]


def flags() -> tuple[Any, ...]:
    """Settings of the process that our work and torch's own tracing change for a while."""
    own: Any = torch.backends
    return own.mkldnn.enabled, own.cudnn.enabled, own.cudnn.allow_tf32, own.cuda.matmul.fp32_precision


def test_threads_compile_at_once(tmp_path: Path) -> None:
    """Two models on three threads, over and over: no error, and the weights that one thread alone gives."""
    ids = [torch.arange(32).view(2, 16) % 57 + 3]
    families, wrong = ("llama", "gpt2"), list[BaseException]()
    before = flags()
    for family in families:
        deep(family, 1).save_pretrained(tmp_path / family)
        sparsify.compile(tmp_path / family, ["wanda:2:4"], calibration=ids, output=tmp_path / f"{family}-alone")

    def work(number: int) -> None:
        try:
            for i in range(2):
                family = families[(number + i) % 2]
                out = tmp_path / f"{family}-{number}-{i}"
                sparsify.compile(tmp_path / family, ["wanda:2:4"], calibration=ids, output=out)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and flags() == before
    for family in families:
        alone = Checkpoint(tmp_path / f"{family}-alone")
        made = list(tmp_path.glob(f"{family}-*-*"))
        assert len(made) == 3
        for path in made:
            other = Checkpoint(path)
            assert all(torch.equal(alone.read(name), other.read(name)) for name in alone.names())


CACHE = """
import sys
from pathlib import Path
from sparsify.runtime.cache import put_whole
path, seen = Path(sys.argv[1]) / "cold" / "kernels", set()
for i in range(200):
    put_whole(path, bytes([int(sys.argv[2])]) * 100_000)
    content = path.read_bytes()
    assert len(content) == 100_000 and len(set(content)) == 1
"""


def test_four_processes_share_a_cold_cache(tmp_path: Path) -> None:
    """Each sees whole files alone, whoever wrote them."""
    done = [start(CACHE, tmp_path, number) for number in range(4)]
    said = [process.communicate(timeout=120)[1] for process in done]
    assert [process.returncode for process in done] == [0] * 4, said
    assert [p.name for p in (tmp_path / "cold").iterdir()] == ["kernels"]


@pytest.mark.exhaustive
def test_four_processes_compile_the_kernels_at_once(tmp_path: Path) -> None:
    code = "from sparsify.runtime.cpu.native import library; assert library() is not None; print(library().path)"
    done = [start(code, SPARSIFY_CACHE=str(tmp_path / "cache")) for _ in range(4)]
    said = [process.communicate(timeout=300) for process in done]
    assert [process.returncode for process in done] == [0] * 4, said
    assert len(Counter(out for out, _ in said)) == 1 and not [*(tmp_path / "cache").glob(".*")]
