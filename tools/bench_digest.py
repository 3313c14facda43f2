"""What digests cost: hashing against reading from the disk, and their share of a compile.

    python tools/bench_digest.py [MODEL ...] [--gigabyte] [--pass wanda:2:4] [--samples 8]

MODEL: folders; the bundled model where none is named. --gigabyte: a checkpoint of 1 GB too, made by
tools/make_checkpoint.py in a temporary folder. Every figure is a ratio within one run, wall seconds with CPU seconds
beside them; a compile without digests is the same compile with a hash that does nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from make_checkpoint import make_checkpoint

import sparsify
from sparsify import tensors
from sparsify.files import checkpoint
from sparsify.files.checkpoint import Checkpoint
from sparsify.host import processor

BUNDLED = Path(__file__).parents[1] / "models" / "pycode-6m"


class Nothing:
    """A hash that costs nothing and says nothing."""

    def update(self, data: Any, /) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


@contextmanager
def without_hashing() -> Iterator[None]:
    real = tensors.new_hash
    try:
        tensors.new_hash = checkpoint.new_hash = lambda algorithm="": Nothing()
        yield
    finally:
        tensors.new_hash = checkpoint.new_hash = real


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of this process, all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def forget(folder: Path) -> None:
    """Let the kernel drop what it holds of the files, so that the next reading comes from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(folder: Path) -> None:
    """Every tensor hashed, against the same bytes read from the disk and from memory and not hashed."""
    files = Checkpoint(folder)
    size = files.nbytes()
    forget(folder)
    with without_hashing():
        cold = timed(files.digests)
        warm = min(timed(files.digests) for _ in range(3))
    forget(folder)
    whole = timed(files.digests)
    hashed = min(timed(files.digests) for _ in range(3))
    gigabytes = size / 1e9
    print(
        f"  {gigabytes:.3f} GB: read from the disk {cold[0]:.2f} s ({gigabytes / cold[0]:.1f} GB/s), from memory "
        f"{warm[0]:.2f}; hashed from memory {hashed[0]:.2f} s ({gigabytes / hashed[0]:.1f} GB/s; CPU {hashed[1]:.2f} s)"
    )
    print(
        f"  hashing from memory / reading from the disk: {hashed[0] / cold[0]:.2f}×; "
        f"read from the disk and hashed / only read: {whole[0] / cold[0]:.2f}×"
    )


def compiling(folder: Path, spec: str, samples: int, again: bool) -> None:
    """A compile with digests against one without; ``again``: of a folder of ours, which is checked as it is read."""
    with tempfile.TemporaryDirectory() as scratch:

        def run(source: Path, name: str = "out", check: bool = True) -> tuple[float, float]:
            out = Path(scratch) / name
            return timed(
                lambda: sparsify.compile(
                    source, [spec], calibration="random", samples=samples, sequence_length=128, output=out,
                    overwrite=True, check=check,
                )
            )  # fmt: skip

        run(folder, "ours")
        source = Path(scratch) / "ours" if again else folder
        with_, without = [], []
        for _ in range(2):
            with_.append(run(source))
            with without_hashing():
                # Its digests are empty: nothing can be held against them.
                without.append(run(source, check=False))
        wall, cpu = (min(w[i] for w in with_) for i in (0, 1))
        wall_0, cpu_0 = (min(w[i] for w in without) for i in (0, 1))
        kind = "a folder of ours" if again else "a source without digests"
        print(
            f"  compile {spec} of {kind}: {wall:.1f} s against {wall_0:.1f}, {wall / wall_0 - 1:+.1%}; "
            f"CPU {cpu:.1f} s against {cpu_0:.1f}, {cpu / cpu_0 - 1:+.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--gigabyte", action="store_true")
    parser.add_argument("--pass", dest="spec", default="wanda:2:4")
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as scratch:
        models = args.models or [BUNDLED]
        if args.gigabyte:
            models = [*models, Path(scratch) / "gigabyte"]
            make_checkpoint(models[-1], "1k", layers=38)
        for model in models:
            print(model.name)
            reading(model)
            for again in (False, True):
                compiling(model, args.spec, args.samples, again)


if __name__ == "__main__":
    main()
