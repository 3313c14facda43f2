"""What looking for NaN costs: CPU seconds of the scan against those of the hash beside it, and of a compile.

python tools/bench_scan.py [MODEL] [--pass wanda:2:4]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sparsify
from sparsify.files.checkpoint import Checkpoint

BUNDLED = Path(__file__).parents[1] / "models" / "pycode-6m"


def cpu(run: Callable[[], object], times: int = 5) -> float:
    """The least CPU seconds of some runs, all threads."""
    taken = []
    for _ in range(times):
        begin = time.process_time()
        run()
        taken.append(time.process_time() - begin)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path, default=BUNDLED)
    parser.add_argument("--pass", dest="spec", default="wanda:2:4")
    args = parser.parse_args()
    files = Checkpoint(args.model)
    scan, digest, size = cpu(files.scans), cpu(files.digests), files.nbytes() / 1e9
    print(f"{size:.3f} GB, read from memory: scan {scan:.4f} s CPU ({size / scan:.1f} GB/s), hash {digest:.4f} s")
    with tempfile.TemporaryDirectory() as scratch:
        whole = cpu(
            lambda: sparsify.compile(
                args.model, [args.spec], calibration="random", samples=8, sequence_length=128,
                output=Path(scratch) / "out", overwrite=True,
            ),
            2,
        )  # fmt: skip
    # Once when copied, once when read.
    print(f"compile {args.spec}: {whole:.2f} s CPU, of which two scans are {2 * scan / whole:.2%}")


if __name__ == "__main__":
    main()
