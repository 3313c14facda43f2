"""Call the operators as nobody should: random arguments, most of them wrong, under AddressSanitizer and UBSan.

    python tools/fuzz_ops.py [--calls 20000] [--seconds 600] [--seed 0] [--isa avx512]

The kernels are compiled with both sanitizers into a temporary folder and called from a process of their own for each
instruction set. A call must give what plain torch gives for the same tensors, or raise an error of ours (torch's own,
where its dispatcher refuses before we are asked). Prints counts; exit code 1 for a report of a sanitizer, a crash,
another exception, or a result that is not the product. Where no compiler has the sanitizers it says so and ends well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

SANITIZERS = ("-fsanitize=address,undefined", "-fsanitize-recover=address,undefined", "-g", "-O1")
OUTCOMES = RIGHT, REFUSED, TORCH, FOREIGN, WRONG = "right", "refused", "refused by torch", "foreign", "wrong"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000, help="shared out over the instruction sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600, help="for each instruction set, at most")
    parser.add_argument("--isa", action="append", help="only these instruction sets (any number of times)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside is not None:
        print(json.dumps(fuzz(asked.calls, asked.seed, asked.seconds, asked.inside)))
        return 0
    return campaign(asked.calls, asked.seed, asked.seconds, asked.isa)


def campaign(calls: int, seed: int, seconds: float, isas: list[str] | None) -> int:
    """All the calls, a process for each instruction set; 1 where something was found."""
    from sparsify.runtime.cpu import native
    from sparsify.runtime.cpu.build import compile_command, find_compiler

    found, compiler = native.library(), find_compiler()
    if found is None or compiler is None:
        print("operators: not fuzzed, there are no kernels here or no C++ compiler to build them with sanitizers")
        return 0
    wanted = isas or list(native.ISAS[: found.best_isa + 1])
    clean = True
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        if subprocess.run(compile_command(compiler, library, SANITIZERS), check=False).returncode:
            print(f"operators: not fuzzed, {' '.join(compiler)} has no sanitizers")
            return 0
        environment = watched(compiler, folder)
        for number, isa in enumerate(wanted):
            share = calls // len(wanted) + (number < calls % len(wanted))
            words = [
                sys.executable,
                __file__,
                "--inside",
                str(library),
                "--calls",
                str(share),
                "--seconds",
                str(seconds),
            ]
            clean &= _one(isa, [*words, "--seed", str(seed + number)], environment)
        clean &= not reported(folder, library.name)
    print("no report" if clean else "FOUND")
    return int(not clean)


def watched(compiler: list[str], folder: str) -> dict[str, str]:
    """The environment of a process in which sanitizers watch a library, and report into ``folder``."""
    log = f"log_path={folder}/report"
    # AddressSanitizer comes first, and looks for the C++ library's functions when it is loaded.
    asked = [[*compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    first = [subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() for words in asked]
    return os.environ | {
        "LD_PRELOAD": ":".join(first),
        "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=0:allocator_may_return_null=1:quarantine_size_mb=64:{log}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{log}",
    }


def reported(folder: str, library: str) -> bool:
    """Whether a sanitizer reported something with a frame of ``library`` or its sources; every report is printed."""
    texts = [report.read_text(errors="replace") for report in sorted(Path(folder).glob("report*"))]
    ours = [library in text or "cpu/kernels/" in text for text in texts]
    for text, own in zip(texts, ours, strict=True):
        if not own:
            # As where onnxruntime ends: its threads may outlive what the exit of the process has freed.
            print(f"a report without {library} or its sources, of another library:")
        print(text[:4000])
    return any(ours)


def _one(isa: str, words: list[str], environment: dict[str, str]) -> bool:
    environment = environment | {"SPARSIFY_CPU_ISA": isa}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{isa}: died with {done.returncode}\n{done.stderr[-3000:]}")
        return False
    counts = json.loads(done.stdout.splitlines()[-1])
    examples = counts.pop("examples")
    print(f"{isa}: {sum(counts.values())} calls: {', '.join(f'{number} {what}' for what, number in counts.items())}")
    print("".join(f"  {example}\n" for example in examples), end="", flush=True)
    return not examples


def fuzz(calls: int, seed: int, seconds: float, library: Path) -> dict[str, Any]:
    """Make the calls, with the kernels of ``library``: how many came to what, and examples of what should not be."""
    import torch
    from raw_calls import mutated, sound_call

    from sparsify.runtime.cpu import native

    loaded = native.NativeLibrary(library)
    native.library = lambda: loaded  # type: ignore[assignment]
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    draw = Random(seed)
    counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
    examples: list[str] = []
    deadline = time.monotonic() + seconds
    for number in range(calls):
        if time.monotonic() > deadline:
            break
        call = sound_call(draw)
        for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
            call = mutated(draw, call)
        said = f"call {number}, {call}"
        # Where it is killed, the last line says by what.
        print(said, file=sys.stderr)
        outcome, why = _outcome(call)
        counts[outcome] += 1
        if outcome in (FOREIGN, WRONG) and len(examples) < 20:
            examples.append(f"{said}: {why}")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB", file=sys.stderr)
    return {**counts, "examples": examples}


def _outcome(call: Any) -> tuple[str, str]:
    from sparsify.errors import SparsifyError

    try:
        got = call.operator(*call.arguments)
    except SparsifyError:
        return REFUSED, ""
    except Exception as error:
        # Torch refuses before, or in the place of, our own code where no frame of ours raised it.
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        by_torch = isinstance(error, (RuntimeError, NotImplementedError, TypeError)) and "/torch/" in last
        return TORCH if by_torch else FOREIGN, f"{type(error).__name__}: {str(error)[:200]}"
    return _judged(call, got)


def _judged(call: Any, got: Any) -> tuple[str, str]:
    """Whether ``got`` is the product that plain torch finds."""
    import few_calls
    import torch
    from torch.nn.functional import linear, pad

    from sparsify.runtime import reference
    from sparsify.runtime.layout import PADDING, UNIT

    if call.truth is None or got.device.type != "cpu":
        return RIGHT, ""
    given = [a.resolve_neg().contiguous() if isinstance(a, torch.Tensor) else a for a in call.arguments]
    if call.truth is reference.linear_bitmask:
        # They read what the mask counts; what lies around it is nobody's.
        given[1] = given[1][int(given[3][0]) : int(given[3][-1]) + PADDING]
    few = call.operator in few_calls.OPERATORS
    beyond = few_calls.slack(call) if few else 0.0
    if beyond is None:
        return RIGHT, ""
    given = few_calls.without_spares(given, call.operator) if few else given
    try:
        exact = plain = call.truth(*given)
        if call.truth is not linear and not few:
            # Of few tokens the kernels multiply the columns that only pad the matrix with zeros, whatever lies there.
            exact = call.truth(pad(given[0], (0, -given[0].shape[-1] % UNIT)), *given[1:])
    except Exception as error:
        # Of experts without tokens nothing is read.
        if not got.any():
            return RIGHT, ""
        return WRONG, f"accepted, where plain torch says {type(error).__name__}: {str(error)[:120]}"
    if got.shape != exact.shape or got.dtype != exact.dtype:
        return WRONG, f"{list(got.shape)} of {got.dtype} for {list(exact.shape)} of {exact.dtype}"
    sure = exact.isnan() == plain.isnan()
    one, other = got.detach().double()[sure], exact.detach().double()[sure]
    if not torch.equal(one.isnan(), other.isnan()):
        return WRONG, "NaN in other places"
    scale = float(other[other.isfinite()].abs().max()) if bool(other.isfinite().any()) else 1.0
    tolerance = 1e-3 if got.dtype is torch.float32 else 3e-2
    if torch.allclose(one, other, rtol=tolerance, atol=tolerance * max(scale, 1e-6) + beyond, equal_nan=True):
        return RIGHT, ""
    return WRONG, f"off by {float((one - other).abs().nan_to_num().max()):.3g} of {scale:.3g}"


if __name__ == "__main__":
    sys.exit(main())
