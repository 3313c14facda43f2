"""What a peer is: another runtime's form of a model, made when its turn comes; and which of them are installed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from sparsify.backends.bench.contender import Reader
from sparsify.errors import SpecError

# What each of them is imported as, and what brings it.
_LLAMA = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
_GENAI = {"onnxruntime_genai": "onnxruntime-genai"}


@dataclass(frozen=True)
class Peer:
    """One form of the model.

    Attributes:
        name: ``llama.cpp Q8_0``. nbytes: of its file.
        open: it, ready to run; what it holds is let go at the end of the context.
    """

    name: str
    nbytes: int
    open: Callable[[], AbstractContextManager[Reader]]


def has_llama() -> bool:
    return not _missing(_LLAMA)


def has_genai() -> bool:
    return not _missing(_GENAI)


def require_peers() -> None:
    """Raises:
    SpecError: none is installed.
    """
    if has_llama() or has_genai():
        return
    missing = {**_missing(_LLAMA), **_missing(_GENAI)}
    raise SpecError(
        "bench --peers",
        found=f"no peer is installed: {', '.join(missing.values())} missing",
        do="pip install llama-cpp-python gguf (which compiles llama.cpp), or pip install onnxruntime-genai",
    )


def version_of(*distributions: str) -> str:
    """Of the first of them that is installed; a build of one's own may have none."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def _missing(modules: dict[str, str]) -> dict[str, str]:
    return {module: package for module, package in modules.items() if find_spec(module) is None}
