"""Load machine code into a GPU and launch what is in it, through the CUDA driver that torch uses too."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import ClassVar

import torch

from sparsify.errors import BackendError
from sparsify.runtime.cuda.nvrtc import machine_code
from sparsify.runtime.cuda.variants import Arguments, Launch

# Above this a kernel has to be told that it may.
_PLAIN_SHARED = 48 << 10
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent of what a multiprocessor has
# What the system keeps of shared memory for each block, and all that a multiprocessor of compute capability 9.0 has.
_OF_SYSTEM, _ALL_SHARED = 1 << 10, 228 << 10


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: which, and 64 bytes for its value."""

    _fields_: ClassVar = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Configuration(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_: ClassVar = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Module:
    """The kernels of one dtype on one device."""

    def __init__(self, code: bytes, device: int) -> None:
        self.device, self._functions = device, dict[str, ctypes.c_void_p]()
        self.multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
        self._module = ctypes.c_void_p()
        with torch.cuda.device(device):
            # The driver's calls go to the context that is current: torch's own, once it has done something there.
            torch.cuda.synchronize(device)
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), code), "loading the CUDA kernels")

    def launch(self, launch: Launch, arguments: Arguments) -> None:
        """Queue ``launch`` on the current stream of the device. Neither waits nor allocates."""
        function = self._functions.get(launch.kernel) or self._function(launch)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        attributes = _attributes(launch)
        configuration = _Configuration(
            launch.grid,
            (launch.threads, 1, 1),
            launch.shared,
            torch.cuda.current_stream(self.device).cuda_stream,
            attributes,
            len(attributes),
        )

        def queue() -> int:
            failed: int = _driver().cuLaunchKernelEx(ctypes.byref(configuration), function, parameters, None)
            return failed

        if torch.cuda.current_device() == self.device:
            failed = queue()
            if failed == _INVALID_CONTEXT:
                # A thread that has not used the GPU yet has no context.
                _adopt_context(self.device)
                failed = queue()
        else:
            with torch.cuda.device(self.device):
                failed = queue()
        _check(failed, f"kernel {launch.kernel}")

    def _function(self, launch: Launch) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        with torch.cuda.device(self.device):
            found = _driver().cuModuleGetFunction(ctypes.byref(function), self._module, launch.kernel.encode())
            _check(found, f"kernel {launch.kernel}")
            # Once and for all, so that a launch inside a CUDA graph's capture has nothing left to set: a kernel takes
            # the same shared memory in every launch.
            if launch.shared > _PLAIN_SHARED:
                failed = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE, launch.shared)
                _check(failed, f"kernel {launch.kernel} with {launch.shared} bytes of shared memory")
            if launch.resident:
                # The rest of that memory is L1, which the inputs want.
                share = -(-100 * launch.resident * (launch.shared + _OF_SYSTEM) // _ALL_SHARED)
                failed = _driver().cuFuncSetAttribute(function, _CARVEOUT, min(share, 100))
                _check(failed, f"kernel {launch.kernel}")
        self._functions[launch.kernel] = function
        return function


def _attributes(launch: Launch) -> ctypes.Array[_Attribute]:
    """What of ``launch`` is more than a grid of blocks after the kernel before it."""
    asked = []
    if launch.cluster > 1:
        asked.append(_Attribute(_CLUSTER_DIMENSION, 0, (1, 1, launch.cluster)))
    if launch.early:
        asked.append(_Attribute(_PROGRAMMATIC, 0, (1,)))
    return (_Attribute * len(asked))(*asked)


@cache
def module(dtype: torch.dtype, device: int) -> Module | None:
    """The kernels of ``dtype`` on GPU number ``device``, compiled and loaded once; None where there is no NVRTC.

    Raises:
        BackendError: they do not compile or load.
    """
    code = machine_code(dtype, torch.cuda.get_device_capability(device))
    return None if code is None else Module(code, device)


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(
            "the CUDA driver", found=str(error), do="Run where NVIDIA's driver is installed (Linux)"
        ) from error


def _adopt_context(device: int) -> None:
    """Make torch's context, the device's primary one, the calling thread's."""
    context = ctypes.c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "the CUDA context")
    _check(_driver().cuCtxSetCurrent(context), "the CUDA context")


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        found = text.value.decode() if text.value else "an error without a name"
        raise BackendError(
            what, found=f"CUDA error {code}: {found}", do="Report this with the GPU's name and torch's version"
        )
