"""Load a folder as its users do, and say what that took, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import sparsify  # noqa: F401 (registers packed folders with transformers)
from sparsify.backends.bench.kinds import folder_kind
from sparsify.errors import CheckpointError
from sparsify.host import peak_memory, recent_peak, reset_peak
from sparsify.import_path import environment, python


@dataclass(frozen=True)
class Loading:
    """What it takes until a model answers: transformers maps files and reads them only when they are used.

    Attributes:
        seconds: of ``from_pretrained``, of :func:`sparsify.load` for a ragged folder, of a session of onnxruntime.
        first: until the output of a first token, loading included.
        before, peak: resident bytes before, and at most until then.
    """

    seconds: float
    first: float
    before: int
    peak: int

    @property
    def added(self) -> int:
        return self.peak - self.before


def measure_loading(folder: str | Path, *, trust_remote_code: bool = False, check: bool = True) -> Loading:
    """Load ``folder`` in a process of its own.

    Raises:
        CheckpointError: it does not load.
    """
    options = {"--trust-remote-code": trust_remote_code, "--no-check": not check}
    words = [*python(__name__), str(folder), *(word for word, given in options.items() if given)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise CheckpointError(f"loading {folder}", found=last_words(done), do="Load it with its own library to see why")
    return Loading(**json.loads(done.stdout.strip().splitlines()[-1]))


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of what a process that failed said of it."""
    return (done.stderr.strip().splitlines() or ["it died"])[-1]


def main() -> None:
    import onnxruntime  # noqa: F401
    import torch
    import transformers.modeling_utils

    from sparsify.backends.bench.opening import open_contender

    folder, trust, check = sys.argv[1], "--trust-remote-code" in sys.argv, "--no-check" not in sys.argv
    transformers.utils.logging.disable_progress_bar()
    # What all these processes import, they import before the measurement.
    if folder_kind(folder) in ("packed", "checkpoint"):
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    cpu = torch.device("cpu")
    fresh = reset_peak(cpu)
    before = (recent_peak(cpu) if fresh else None) or peak_memory()
    start = time.perf_counter()
    model = open_contender(folder, trust_remote_code=trust, check=check)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        model.forward(model.inputs(1))
    first = time.perf_counter() - start
    print(json.dumps(asdict(Loading(seconds, first, before, (recent_peak(cpu) if fresh else None) or peak_memory()))))
