"""Compile ``kernels/*.h`` for the GPU at hand with NVRTC, which comes with torch's CUDA builds; once, then from a
cache.

No toolkit, no header of CUDA and no compiler is needed: the sources include nothing but each other.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import site
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from sparsify.errors import BackendError
from sparsify.runtime.cache import cache_folder, put_whole, read_whole
from sparsify.runtime.cuda.variants import HOPPER
from sparsify.runtime.seal import sealed, unsealed

SOURCES = Path(__file__).parent / "kernels"
MAIN = "kernels.cu"
TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
OPTIONS = ("-std=c++17",)
# The first that knows sm_90a.
_WITH_HOPPERS_OWN = (12, 0)


def source_hash() -> str:
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cu"))
    return hashlib.sha256(text).hexdigest()[:16]


class CompileLog(Exception):
    """All that NVRTC says of a source that does not compile: the cause of the error that a user sees."""


class NVRTC:
    """The library.

    Raises:
        OSError: it does not load.
    """

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        self.architectures = sorted(archs)

    def target(self, capability: tuple[int, int]) -> str:
        """What machine code for ``capability`` is called: with all that Hopper has and nothing after it, ``sm_90a``."""
        major, minor = capability
        return f"sm_{major}{minor}" + ("a" if capability == HOPPER and self.version >= _WITH_HOPPERS_OWN else "")

    def compile(self, dtype: torch.dtype, capability: tuple[int, int]) -> bytes:
        """The kernels of ``dtype`` as machine code; as PTX where the GPU is newer than this NVRTC.

        Raises:
            BackendError: it does not compile.
        """
        wanted = 10 * capability[0] + capability[1]
        known = wanted in self.architectures
        older = [a for a in self.architectures if a < wanted]
        if not known and not older:
            raise self._failure(f"for compute capability {capability}", "it is too old for every kernel")
        target = self.target(capability) if known else f"compute_{older[-1]}"
        headers = sorted(p for p in SOURCES.iterdir() if p.suffix == ".h")
        texts = (ctypes.c_char_p * len(headers))(*(p.read_bytes() for p in headers))
        names = (ctypes.c_char_p * len(headers))(*(p.name.encode() for p in headers))
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            (SOURCES / MAIN).read_bytes(),
            MAIN.encode(),
            len(headers),
            texts,
            names,
        )
        try:
            words = [*OPTIONS, f"--gpu-architecture={target}", f"-DSPARSIFY_TYPE={TYPES[dtype]}"]
            options = (ctypes.c_char_p * len(words))(*(w.encode() for w in words))
            if self._library.nvrtcCompileProgram(program, len(words), options):
                log = self._output(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode(errors="replace")
                line = next((line for line in log.splitlines() if "error" in line), log[:200])
                raise self._failure(target, line) from CompileLog(log)
            if known:
                return self._output(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
            return self._output(program, "nvrtcGetPTXSize", "nvrtcGetPTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _output(self, program: ctypes.c_void_p, size_of: str, get: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_of, program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(get, program, text)
        return text.raw

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._library, name)(*arguments):
            text = self._library.nvrtcGetErrorString(code)
            raise self._failure(name, text.decode() if text else f"error {code}")

    def _failure(self, what: str, found: str) -> BackendError:
        version = ".".join(map(str, getattr(self, "version", ())))
        return BackendError(
            f"compiling the CUDA kernels ({what}, NVRTC {version})",
            found=found,
            do="Install a newer nvidia-cuda-nvrtc; the Triton kernels serve until then",
        )


@cache
def nvrtc() -> NVRTC | None:
    """The first NVRTC that loads: torch's own, a toolkit's, the system's. None where there is none."""
    for path in _candidates():
        try:
            return NVRTC(path)
        except (OSError, AttributeError):
            continue
    return None


def machine_code(dtype: torch.dtype, capability: tuple[int, int]) -> bytes | None:
    """The kernels of ``dtype`` for a GPU of ``capability``, from the cache folder where they are; None without NVRTC.

    Raises:
        BackendError: they do not compile.
    """
    compiler = nvrtc()
    if compiler is None:
        return None
    version = "{}.{}".format(*compiler.version)
    path = cache_folder() / f"cuda-{source_hash()}-{TYPES[dtype]}-{compiler.target(capability)}-nvrtc{version}.bin"
    kept = read_whole(path)
    code = unsealed(kept) if kept is not None else None
    if code is None:
        code = compiler.compile(dtype, capability)
        put_whole(path, sealed(code))
    return code


def _candidates() -> Iterator[str]:
    # Beside torch lie the packages of NVIDIA that it was installed with. sys.path may hold the working directory.
    installed = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    places = [Path(torch.__file__).parent.parent / "nvidia", *(Path(place) / "nvidia" for place in installed)]
    for place in dict.fromkeys(places):
        if place.is_dir():
            yield from map(str, sorted(place.glob("*/lib/libnvrtc.so.*[0-9]"), reverse=True))
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")):
        yield from map(str, sorted((Path(home) / "lib64").glob("libnvrtc.so.*[0-9]"), reverse=True))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
