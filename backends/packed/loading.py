"""Load a folder as its users do, and say what that took: ``python -m sparsify.backends.packed.loading FOLDER``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sparsify  # noqa: F401 (registers packed folders with transformers)
from sparsify.errors import CheckpointError, first_line
from sparsify.memory import peak_memory, recent_peak, reset_peak


@dataclass(frozen=True)
class Loading:
    """Seconds of ``from_pretrained``; resident bytes before it, and at most until it was done."""

    seconds: float
    before: int
    peak: int

    @property
    def added(self) -> int:
        return self.peak - self.before


def load_model(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The model of a Hugging Face folder or hub id, packed or not, in eval mode, in the dtype that it is stored in.

    Raises:
        CheckpointError: transformers does not load it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        names = list(getattr(config, "architectures", None) or [])
        kind: Any = getattr(transformers, names[0], None) if names else None
        if kind is None:
            causal = bool(names) and "CausalLM" in names[0]
            kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
            return kind.from_pretrained(folder, trust_remote_code=trust_remote_code, dtype="auto").eval()
        return kind.from_pretrained(folder, dtype="auto").eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"loading {folder}", found=f"transformers refuses it: {first_line(error)}", do="Check the folder"
        ) from error


def measure_loading(folder: str | Path, *, trust_remote_code: bool = False) -> Loading:
    """Load ``folder`` in a process of its own.

    Raises:
        CheckpointError: it does not load.
    """
    words = [sys.executable, "-m", __name__, str(folder), *(["--trust-remote-code"] if trust_remote_code else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it died"])[-1]
        raise CheckpointError(f"loading {folder}", found=last, do="Load it with transformers to see why")
    return Loading(**json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    import torch
    import transformers.modeling_utils

    transformers.utils.logging.disable_progress_bar()
    # The quantizer and the model's own code are imported before the measurement, as they are in the dense process.
    transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code="--trust-remote-code" in sys.argv)
    cpu = torch.device("cpu")
    fresh = reset_peak(cpu)
    before = (recent_peak(cpu) if fresh else None) or peak_memory()
    start = time.perf_counter()
    load_model(sys.argv[1], trust_remote_code="--trust-remote-code" in sys.argv)
    seconds = time.perf_counter() - start
    print(json.dumps(asdict(Loading(seconds, before, (recent_peak(cpu) if fresh else None) or peak_memory()))))


if __name__ == "__main__":
    main()
