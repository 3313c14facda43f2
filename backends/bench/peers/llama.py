"""llama.cpp, by the low-level interface of llama-cpp-python."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsify.backends.bench.contender import Clock, Generated, Reader
from sparsify.backends.bench.peers.gguf_file import write_gguf
from sparsify.backends.bench.peers.peer import Peer, version_of
from sparsify.errors import BackendError

# What llama.cpp's own quantizer makes of a model, by its numbers for them.
_QUANTIZED = {"Q8_0": 7, "Q4_0": 2}


def llama_peers(model: Any, folder: Path) -> Iterator[Peer]:
    """Files of ``model`` (of transformers) in ``folder``: with its own dtype, then as llama.cpp quantizes it, each
    deleted before the one after the next is made.

    Raises:
        BackendError: no file for this model, or one that llama.cpp cannot quantize.
    """
    dense = folder / "dense.gguf"
    kind = write_gguf(model, dense)
    yield _peer(kind, dense)
    for name, number in _QUANTIZED.items():
        path = folder / f"{name}.gguf"
        _quantize(dense, path, name, number)
        yield _peer(name, path)
        path.unlink()


def llama_version() -> str:
    return f"llama-cpp-python {version_of('llama-cpp-python')}"


def _peer(kind: str, path: Path) -> Peer:
    return Peer(f"llama.cpp {kind}", path.stat().st_size, partial(_opened, path))


@contextmanager
def _opened(path: Path) -> Iterator[Reader]:
    reader = InLlama(path)
    try:
        yield reader
    finally:
        reader.close()


class InLlama:
    """A GGUF file in llama.cpp on the CPU, with as many threads as torch takes."""

    def __init__(self, path: Path) -> None:
        self._library = _library()
        params = self._library.llama_model_default_params()
        params.n_gpu_layers = 0
        self._path, self._model, self._context, self._room = path, None, None, 0
        self._model = self._library.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise BackendError(f"llama.cpp on {path.name}", found="it does not load", do=_REPORT)
        vocabulary = self._library.llama_model_get_vocab(self._model)
        self._words: int = self._library.llama_vocab_n_tokens(vocabulary)

    def read_prompt(self, ids: Tensor) -> None:
        self._begin(ids.shape[1])
        self._decode(ids[0].tolist())

    def generate(self, ids: Tensor, count: int) -> Generated:
        self._begin(ids.shape[1] + count)
        made, clock, given = list[int](), Clock(), ids[0].tolist()
        for _ in range(count):
            made.append(self._decode(given))
            clock.tick()
            given = made[-1:]
        return clock.of(torch.tensor(made))

    def close(self) -> None:
        if self._context is not None:
            self._library.llama_free(self._context)
        if self._model is not None:
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    def _begin(self, tokens: int) -> None:
        """An empty cache with room for so many."""
        if tokens > self._room:
            if self._context is not None:
                self._library.llama_free(self._context)
            self._context, self._room = self._new_context(tokens), tokens
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _new_context(self, tokens: int) -> Any:
        params = self._library.llama_context_default_params()
        params.n_ctx = params.n_batch = tokens
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        context = self._library.llama_init_from_model(self._model, params)
        if not context:
            found = f"no context of {tokens} tokens"
            raise BackendError(f"llama.cpp on {self._path.name}", found=found, do="Give fewer --prompt and --tokens")
        return context

    def _decode(self, tokens: list[int]) -> int:
        """The likeliest token after these and those that came before."""
        given = (self._library.llama_token * len(tokens))(*tokens)
        code = self._library.llama_decode(self._context, self._library.llama_batch_get_one(given, len(tokens)))
        if code:
            raise BackendError(f"llama.cpp on {self._path.name}", found=f"decoding ended with {code}", do=_REPORT)
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._words,)).argmax())


_REPORT = "Update llama-cpp-python, or leave --peers out"


def _quantize(dense: Path, path: Path, name: str, number: int) -> None:
    library = _library()
    params = library.llama_model_quantize_default_params()
    params.nthread, params.ftype = torch.get_num_threads(), number
    code = library.llama_model_quantize(str(dense).encode(), str(path).encode(), ctypes.byref(params))
    if code:
        found = f"its quantizer ended with {code}"
        raise BackendError(f"llama.cpp {name}", found=found, do="Columns of every matrix are to be multiples of 32")


def _library() -> Any:
    """llama_cpp, silent."""
    import llama_cpp

    if not _silenced:
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        _silenced.append(silent)
    return llama_cpp


# What llama.cpp was given to call instead of printing: it keeps the address alone.
_silenced: list[Any] = []
