"""Give onnxruntime graphs of our operators as nobody should, under AddressSanitizer and UBSan.

    python tools/fuzz_onnx.py [--graphs 2000] [--seconds 600] [--seed 0] [--isa avx512]

The library is compiled with both sanitizers into a temporary folder; onnxruntime opens random graphs with it, in a
process for each instruction set: sound ones, and with attributes, shapes, types, contents and inputs changed. A sound
graph must give the product; any other that product, or an error. Prints counts; exit code 1 for a report of a
sanitizer, a crash, a wrong product, or a sound graph that is refused. Where no compiler has the sanitizers it says so
and ends well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

RIGHT, REFUSED, WRONG = "right", "refused", "wrong"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=2000, help="shared out over the instruction sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600, help="for each instruction set, at most")
    parser.add_argument("--isa", action="append", help="only these instruction sets (any number of times)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside is not None:
        print(json.dumps(fuzz(asked.graphs, asked.seed, asked.seconds, asked.inside)))
        return 0
    return campaign(asked.graphs, asked.seed, asked.seconds, asked.isa)


def campaign(graphs: int, seed: int, seconds: float, isas: list[str] | None) -> int:
    """All the graphs, a process for each instruction set; 1 where something was found."""
    from fuzz_ops import SANITIZERS, reported, watched

    from sparsify.runtime.cpu import native
    from sparsify.runtime.cpu.build import OPERATORS, compile_command, find_compiler

    found, compiler = native.library(), find_compiler()
    if found is None or compiler is None:
        print("graphs: not fuzzed, there are no kernels here or no C++ compiler to build them with sanitizers")
        return 0
    wanted = isas or list(native.ISAS[: found.best_isa + 1])
    clean = True
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "operators.so"
        if subprocess.run(compile_command(compiler, library, SANITIZERS, OPERATORS), check=False).returncode:
            print(f"graphs: not fuzzed, {' '.join(compiler)} has no sanitizers")
            return 0
        environment = watched(compiler, folder)
        for number, isa in enumerate(wanted):
            share = graphs // len(wanted) + (number < graphs % len(wanted))
            words = [sys.executable, __file__, "--inside", str(library), "--graphs", str(share)]
            words += ["--seconds", str(seconds), "--seed", str(seed + number)]
            own = environment | {"SPARSIFY_CPU_ISA": isa}
            done = subprocess.run(words, env=own, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{isa}: died with {done.returncode}\n{done.stderr[-3000:]}")
                clean = False
                continue
            counts = json.loads(done.stdout.splitlines()[-1])
            examples = counts.pop("examples")
            said = ", ".join(f"{count} {what}" for what, count in counts.items())
            print(f"{isa}: {sum(counts.values())} graphs: {said}")
            print("".join(f"  {example}\n" for example in examples), end="", flush=True)
            clean &= not examples
        clean &= not reported(folder, library.name)
    print("no report" if clean else "FOUND")
    return int(not clean)


def fuzz(graphs: int, seed: int, seconds: float, library: Path) -> dict[str, Any]:
    """Open and run graphs with ``library``: how many came to what, and examples of what should not be."""
    import torch
    from onnx_graphs import answer, changed, sound

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    draw = Random(seed)
    counts: Counter[str] = Counter({RIGHT: 0, REFUSED: 0, WRONG: 0})
    examples: list[str] = []
    deadline = time.monotonic() + seconds
    for number in range(graphs):
        if time.monotonic() > deadline:
            break
        case = sound(draw)
        changes = draw.choice((0, 1, 1, 1, 2, 3))
        for _ in range(changes):
            case = changed(draw, case)
        said = f"graph {number}, {case}"
        # Where it is killed, the last line says by what.
        print(said, file=sys.stderr)
        why = answer(case, library, threads=draw.choice((1, 3)))
        refused = why is not None and why.startswith("refused")
        outcome = RIGHT if why is None else REFUSED if refused and case.changed else WRONG
        counts[outcome] += 1
        if outcome == WRONG and len(examples) < 20:
            examples.append(f"{said}: {why}")
    return {**counts, "examples": examples}


if __name__ == "__main__":
    sys.exit(main())
