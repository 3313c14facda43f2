"""Spoil what sparsify reads, run a command on it, and count how it ended.

    python tools/fuzz [KIND…] --seed 0 --seconds 60     # each kind for so long
    python tools/fuzz json --seed 0 --only 17           # trial 17 once more, with what it printed

Every trial is a fork with bounds on memory, files and time, and draws from a generator of its own, made from the seed,
the kind and its number. Faults: another library's error, a signal, no end, something left where the output or a
temporary file was, a control character printed, a change of a folder with digests, or NaN, that nothing noticed. Each
is shown with the line that repeats it; any makes the exit code 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path[:0] = [str(Path(__file__).parents[1].parent / "tests"), str(Path(__file__).parent)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description="Spoil what sparsify reads, and count how it ends.")
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help="checkpoints, packed, json, onnx, words, sealed, poison; all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="for each kind")
    parser.add_argument("--trials", type=int, default=1 << 30, help="of each kind, at most")
    parser.add_argument("--only", type=int, help="the trial of this number, with what it printed")
    asked = parser.parse_args()

    import torch

    # Threads of the parent are not there in a fork.
    torch.set_num_threads(1)
    from kinds import KINDS
    from sound import make_all

    if unknown := set(asked.kinds) - set(KINDS):
        parser.error(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="sparsify-fuzz-") as folder:
        place = Path(folder)
        (place / "sound").mkdir()
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123 (the commands print)
            before, sys.stdout = sys.stdout, nowhere
            try:
                make_all(place / "sound")
            finally:
                sys.stdout = before
        counts = {name: _fuzz(name, asked, place) for name in asked.kinds or KINDS}
    return _report(counts, asked.seed)


def _fuzz(name: str, asked: argparse.Namespace, place: Path) -> Counter[str]:
    from harness import FAULTS

    counts: Counter[str] = Counter()
    deadline = time.monotonic() + asked.seconds
    number = asked.only or 0
    shown = 0
    while number < asked.trials and (time.monotonic() < deadline or asked.only is not None):
        kind, words, text = _trial(name, asked.seed, number, place, show=asked.only is not None)
        counts[kind] += 1
        if kind in FAULTS and shown < 5:
            shown += 1
            again = f"python tools/fuzz {name} --seed {asked.seed} --only {number}"
            print(f"{kind}: {again}\n  {words}\n{text}", flush=True)
        number += 1
        if asked.only is not None:
            break
    return counts


def _trial(name: str, seed: int, number: int, place: Path, *, show: bool) -> tuple[str, list[str], str]:
    """How one trial ended, its words, and what to show of it."""
    from harness import attempt, printed_raw
    from kinds import KINDS

    work, temporary = place / "work", place / "temporary"
    for folder in (work, temporary):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    os.chdir(work)
    spoilt = KINDS[name](Random(f"{seed} {name} {number}"), place / "sound", work)
    words = list(spoilt.words)
    given = {p.name for p in work.iterdir()}
    outcome = attempt(words, place / "said")
    kind, text = outcome.kind, outcome.text
    new = {p.name for p in work.iterdir()} - given
    if kind in ("well", "refused") and (line := printed_raw(place / "said")) is not None:
        kind, text = "raw", repr(line)
    if kind == "refused" and new and "verify" not in words:
        kind, text = "left", f"{sorted(new)} after: {text}"
    if kind == "well" and (hidden := [n for n in new if n.startswith(".")]):
        kind, text = "left", f"{hidden} beside the output"
    if kind == "well" and spoilt.sealed is not None:
        kind, text = "accepted", f"{spoilt.sealed.name} was changed, and nothing said so"
    if show:
        print(" ".join(map(ascii, words)), kind, text, (place / "said").read_text(errors="replace"), sep="\n")
    tempfile.tempdir = None
    return kind, words, text


def _report(counts: dict[str, Counter[str]], seed: int) -> int:
    from harness import FAULTS

    columns = ("well", "refused", *FAULTS)
    print(f"seed {seed}\n{'kind':14}{'trials':>8}" + "".join(f"{column:>10}" for column in columns))
    for name, found in counts.items():
        print(f"{name:14}{sum(found.values()):8}" + "".join(f"{found[column]:10}" for column in columns))
    return int(any(found[fault] for found in counts.values() for fault in FAULTS))


if __name__ == "__main__":
    raise SystemExit(main())
