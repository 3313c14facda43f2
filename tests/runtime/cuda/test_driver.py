"""How kernels are loaded and launched, over a driver that is the emulator."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import emulate
from support.gpus import on_gpu, prepared
from support.matrices import error

from sparsify.errors import BackendError
from sparsify.runtime.cuda import driver, products
from sparsify.runtime.cuda.variants import Arguments, Launch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine with two GPUs, number 0 in use. What is asked of torch is listed."""
    asked: list[str] = []
    current = [0]

    @contextlib.contextmanager
    def device(number: int) -> Iterator[None]:
        before, current[0] = current[0], number
        asked.append(f"on {number}")
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda number: asked.append(f"wait for {number}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda number: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    properties = SimpleNamespace(multi_processor_count=emulate.MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(driver, "_driver", lambda: emulate.library(torch.bfloat16))
    monkeypatch.setattr(driver, "machine_code", lambda dtype, capability: b"code of sm_%d%d" % capability)
    driver.module.cache_clear()
    yield asked
    driver.module.cache_clear()


def test_a_product_through_the_driver(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(products, "_module", lambda x: driver.module(x.dtype, 0))
    dense, weight = prepared(40, 600)
    bias = torch.randn(40).bfloat16()
    early = emulate.library(torch.bfloat16).launched_early
    plans = {
        None: 0,
        "8:bulk_w8_r1_m1,16:bulk_w4_r1_m2_s2_e,*:tiled_w4_r1_m8_s2_e": 3,
        "16:decode_w8_r2_m2_s2,*:unpack": 0,
    }
    for plan, count in plans.items():
        before = early()
        for tokens in (1, 16, 70):
            x = torch.randn(tokens, 600).bfloat16()
            assert error(on_gpu(weight, x, bias, plan), x.double() @ dense.double().t() + bias.double()) < 4e-3
        # The sum of a tiled kernel's splits starts early with it.
        assert early() - before == count
    # It is waited for once, when the code is loaded, and never again.
    assert gpu.count("wait for 0") == 1 and driver.module(torch.bfloat16, 0) is driver.module(torch.bfloat16, 0)


def test_a_thread_without_a_context_takes_torchs_own(gpu: list[str]) -> None:
    library = emulate.library(torch.bfloat16)
    library.cuCtxSetCurrent(None)
    dense, weight = prepared(16, 256)
    module = driver.module(torch.bfloat16, 0)
    assert module is not None and weight.fragments is not None
    out = torch.zeros(16, 256, dtype=torch.bfloat16)
    arguments = Arguments(weight.fragments.data_ptr(), None, None, out.data_ptr(), None, 0, 0, 256, 1, 1, 0, 0, 16)
    module.launch(Launch("unpack", (1, 1, 1), 32, 0), arguments)
    assert torch.equal(out, dense + 0)


def test_another_gpu_than_the_current_one(gpu: list[str]) -> None:
    dense, weight = prepared(16, 256)
    module = driver.module(torch.bfloat16, 1)
    assert module is not None and weight.fragments is not None
    out = torch.zeros(16, 256, dtype=torch.bfloat16)
    arguments = Arguments(weight.fragments.data_ptr(), None, None, out.data_ptr(), None, 0, 0, 256, 1, 1, 0, 0, 16)
    emulate.library(torch.bfloat16).cuCtxSetCurrent(1)
    gpu.clear()
    module.launch(Launch("unpack", (1, 1, 1), 32, 0), arguments)
    assert "on 1" in gpu and torch.equal(out, dense + 0) and torch.cuda.current_device() == 0


def test_what_the_driver_refuses_is_said(gpu: list[str]) -> None:
    module = driver.module(torch.bfloat16, 0)
    assert module is not None
    emulate.library(torch.bfloat16).cuCtxSetCurrent(1)
    with pytest.raises(BackendError, match="named symbol not found"):
        module.launch(Launch("nothing", (1, 1, 1), 32, 0), Arguments())
    with pytest.raises(BackendError, match="CUDA error 1"):
        module.launch(Launch("unpack", (0, 1, 1), 32, 0), Arguments())


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    driver._driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(BackendError, match=r"libcuda.*NVIDIA's driver"):
        driver._driver()
