"""A tiny model of every model type of transformers through all that sparsify does, and the table of what came out.

python tools/breadth run RESULTS.jsonl [TYPE…]     # types that are not in it yet; all of them take hours
python tools/breadth show TYPE…                    # some, with what they print
python tools/breadth collect RESULTS.jsonl…        # into tools/breadth/results.json, over what it had of these types
python tools/breadth table > docs/architectures.md

Some types (Gemma 3n, MaskFormer and others) need timm and scipy beside what sparsify's tests do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Not this folder, whose modules are those of the package.
sys.path[:] = [str(Path(__file__).parents[1]), *(p for p in sys.path if p != str(Path(__file__).parent))]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="breadth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "show", "collect", "table"))
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seconds", type=float, default=150, help="for each type, at most")
    parser.add_argument("--until", help="HH:MM after which no other type is begun")
    parser.add_argument("--steps", help="of them all, those named", default="")
    asked = parser.parse_intermixed_args()
    if asked.command == "table":
        from breadth.table import table

        print(table(), end="")
        return 0
    if asked.command == "collect":
        from breadth.kinds import model_types
        from breadth.table import collect, installed

        collect(map(Path, asked.words), time.strftime("%Y-%m-%d"), installed(), model_types())
        return 0
    from breadth.kinds import model_types
    from breadth.trial import isolated

    steps = asked.steps.split(",") if asked.steps else None
    _prepare(warm=asked.command == "run", steps=steps)
    if asked.command == "show":
        os.environ["BREADTH_DEBUG"] = "1"
        for kind in asked.words:
            print(json.dumps(isolated(kind, asked.seconds, steps), indent=1))
        return 0
    file, kinds = Path(asked.words[0]), asked.words[1:] or model_types()
    done = {json.loads(line)["kind"] for line in file.read_text().splitlines()} if file.exists() else set()
    for kind in kinds:
        if kind in done:
            continue
        if asked.until and time.strftime("%H:%M") >= asked.until:
            break
        found = isolated(kind, asked.seconds, steps)
        with file.open("a") as out:
            out.write(json.dumps(found) + "\n")
        odd = {
            n: f"{s['verdict']}: {s.get('reason', '')}"[:150]
            for n, s in found["steps"].items()
            if s["verdict"] != "right"
        }
        print(f"{kind} {found['seconds']}", odd or "right", flush=True)
    return 0


def _prepare(*, warm: bool, steps: list[str] | None) -> None:
    """Import once what every trial imports."""
    import torch

    torch.set_num_threads(1)
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch.export
    import torch.onnx
    import transformers

    import sparsify.backends.onnx.job
    import sparsify.backends.packed.job
    import sparsify.backends.verify.onnx_folder
    import sparsify.compiler.pipeline  # noqa: F401
    from breadth.trial import attempt

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if warm:
        # What is imported and filled when it is first used would be so in every fork.
        with tempfile.TemporaryDirectory(prefix="breadth-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt("llama", Path(folder), lambda said: None, steps)


if __name__ == "__main__":
    raise SystemExit(main())
