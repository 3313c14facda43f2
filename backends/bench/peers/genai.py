"""onnxruntime-genai, on the graph that its own builder makes of the model's folder, with few bits (``MatMulNBits``)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsify.backends.bench.contender import Clock, Generated, Reader
from sparsify.backends.bench.loading import last_words
from sparsify.backends.bench.peers.peer import Peer, version_of
from sparsify.errors import BackendError
from sparsify.import_path import environment

_PRECISIONS = ("int8", "int4")


def genai_peers(source: Path, folder: Path) -> Iterator[Peer]:
    """What the builder makes of the model in ``source``, in folders inside ``folder``.

    Raises:
        BackendError: the builder does not know the model, or lacks something of it (its tokenizer, say).
    """
    for precision in _PRECISIONS:
        place = folder / precision
        _build(source, precision, place)
        _set_threads(place / "genai_config.json")
        nbytes = sum(path.stat().st_size for path in place.glob("*.onnx*"))
        yield Peer(f"genai {precision}", nbytes, partial(_opened, place))


def genai_version() -> str:
    return f"onnxruntime-genai {version_of('onnxruntime-genai', 'onnxruntime-genai-cuda')}"


class InGenai:
    """A folder of onnxruntime-genai's."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self._library: Any = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))

    def read_prompt(self, ids: Tensor) -> None:
        self._begin(ids, 1)

    def generate(self, ids: Tensor, count: int) -> Generated:
        generator, clock = self._begin(ids, count), Clock()
        for _ in range(count):
            generator.generate_next_token()
            clock.tick()
        return clock.of(torch.tensor(np.array(generator.get_sequence(0))[-count:]))

    def _begin(self, ids: Tensor, count: int) -> Any:
        """A generator that has taken the prompt."""
        params = self._library.GeneratorParams(self._model)
        length = ids.shape[1] + count
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self._library.Generator(self._model, params)
        generator.append_tokens(ids.numpy().astype(np.int32))
        return generator


@contextmanager
def _opened(folder: Path) -> Iterator[Reader]:
    yield InGenai(folder)


def _build(source: Path, precision: str, out: Path) -> None:
    """By the builder, in a process of its own."""
    words = ["-i", str(source), "-o", str(out), "-p", precision, "-e", "cpu", "-c", str(out.parent / "cache")]
    # -P: the working directory is no place for modules. Python 3.10 has no such word.
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    command = [sys.executable, *safe, "-W", "ignore", "-m", "onnxruntime_genai.models.builder", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        do = "Its builder takes folders of families that it knows, with their tokenizer"
        raise BackendError(f"onnxruntime-genai {precision} of {source}", found=last_words(done), do=do)


def _set_threads(path: Path) -> None:
    """As many as torch takes."""
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = torch.get_num_threads()
    path.write_text(json.dumps(config))
