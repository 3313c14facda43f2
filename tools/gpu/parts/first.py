"""What the machine is, whether the kernels compile, and one product of each family of them: a minute."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from functools import partial

import torch
from machine import Found, Machine, Step
from results import Results
from torch import Tensor

from sparsify.runtime.cuda import compressed as libraries
from sparsify.runtime.cuda import nvrtc
from sparsify.runtime.cuda.autotune.times import random_24
from sparsify.runtime.cuda.dispatch import is_own
from sparsify.runtime.cuda.fragments import to_fragments
from sparsify.runtime.cuda.integers import pack_fragments
from sparsify.runtime.cuda.products import run_kernel
from sparsify.runtime.cuda.variants import Variant
from sparsify.runtime.layout import Packed, unpack

# ‖y − exact‖ / ‖exact‖ that a product in 16 bits stays below.
BAR = 4e-3
# Family to the kernels that are tried for it, with a number of tokens. From those that everything else needs to those
# that may be illegal on a GPU that nobody has tried.
FAMILIES: dict[str, Sequence[tuple[str, int]]] = {
    "decode": [("decode_w8_r1_m1", 1), ("decode_w8_r1_m2", 16), ("decode_w8_r2_m2", 9), ("decode_w16_r1_m1", 8)],
    "tiled": [("tiled_w8_r2_m8", 70), ("tiled_w4_r1_m4", 17)],
    "unpack": [("unpack", 300)],
    "splits": [("tiled_w4_r1_m8_s4", 64)],
    "library": [("library", 64), ("library", 256)],
    "triton": [("triton", 1), ("triton", 16)],
    "early": [("decode_w8_r1_m1_e", 1), ("tiled_w4_r1_m4_s2_e", 33)],
    "clusters": [("decode_w8_r1_m1_s2", 1), ("decode_w8_r1_m2_s8", 16), ("decode_w8_r1_m1_s4_e", 3)],
    "integers": [
        ("int8g256_w8_r1_m1", 1),
        ("int8g32_w8_r1_m2", 16),
        ("int4g64_w8_r1_m1", 8),
        ("int4g32_w8_r1_m2", 9),
        ("int4g256_w8_r1_m1_s2_e", 3),
    ],
    "bulk": [("bulk_w8_r1_m1", 1), ("bulk_w4_r1_m2", 16), ("bulk_w8_r2_m2", 12), ("bulk_w8_r1_m1_s2_e", 5)],
    "wide": [("wide_w8_r4_m8", 64), ("wide_w8_r2_m4", 20), ("wide_w8_r4_m4_s3", 33), ("wide_w8_r2_m8_s8_e", 200)],
    "wgmma": [
        ("wgmma_w12_r1_m8", 64),
        ("wgmma_w16_r1_m8", 33),
        ("wgmma_w12_r2_m8", 70),
        ("wgmma_w12_r1_m16", 128),
        ("wgmma_w16_r1_m16_s2_e", 65),
        ("wgmma_w12_r2_m16", 100),
        ("wgmma_w12_r1_m32", 200),
        ("wgmma_w12_r1_m8_s4", 20),
    ],
}


CAPTURED = (
    "decode_w8_r1_m1", "unpack", "library", "decode_w8_r1_m1_e", "tiled_w4_r1_m4_s2_e", "decode_w8_r1_m1_s2",
    "bulk_w8_r1_m1_e", "decode_w8_r1_m1_s2_e", "wide_w8_r4_m8_s3_e", "wgmma_w12_r1_m8_s4_e",
)  # fmt: skip


def steps(machine: Machine, results: Results) -> list[Step]:
    listed: list[Step] = [("environment", partial(environment, machine))]
    for dtype in nvrtc.TYPES:
        listed.append((f"compile {nvrtc.TYPES[dtype]}", partial(compile_kernels, machine, dtype)))
    # Before what may hang.
    listed.append(("ceilings", partial(ceilings, machine)))
    listed += [(family, partial(try_family, machine, family)) for family in FAMILIES]
    return [*listed, *((f"captured {name}", partial(capture, machine, name)) for name in CAPTURED)]


def environment(machine: Machine) -> Found:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("transformers", "triton", "safetensors"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            versions[name] = "missing"
    compiler = nvrtc.nvrtc()
    versions["nvrtc"] = "missing" if compiler is None else "{}.{}".format(*compiler.version)
    built = getattr(torch.backends, "cusparselt", None)
    versions["cusparselt"] = str(built.version()) if built is not None and built.is_available() else "missing"
    found: dict[str, object] = {
        "gpu": machine.gpu.name,
        "capability": list(machine.gpu.capability),
        "multiprocessors": machine.gpu.multiprocessors,
        "library": machine.gpu.library,
        "versions": versions,
    }
    if not machine.emulated:
        properties = torch.cuda.get_device_properties(machine.device)
        found |= {"l2_bytes": properties.L2_cache_size, "memory_bytes": properties.total_memory}
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
        found["driver"] = next((part.split()[0] for part in done.stdout.split("Driver Version: ")[1:]), "unknown")
        print(done.stdout or done.stderr, flush=True)
    return found


def compile_kernels(machine: Machine, dtype: torch.dtype) -> Found:
    began = time.perf_counter()
    code = nvrtc.machine_code(dtype, machine.gpu.capability)
    if code is None:
        raise RuntimeError("no NVRTC here")
    return {"bytes": len(code), "compiled_in": round(time.perf_counter() - began, 2)}


def try_family(machine: Machine, family: str) -> Found:
    """Its kernels on a square matrix and one that ends within tiles, against float64; each twice, for the same bits."""
    worst, count = 0.0, 0
    for rows, columns in ((machine.sizes.square, machine.sizes.square), (112, 1152)):
        for name, tokens in FAMILIES[family]:
            worst, count = max(worst, _try(machine, name, tokens, rows, columns)), count + 1
    return {"products": count, "worst": worst}


def _try(machine: Machine, name: str, tokens: int, rows: int, columns: int) -> float:
    grid = Variant.named(name).grid if is_own(name) else None
    packed = random_24(rows, columns, torch.bfloat16, machine.device, grid)
    x = torch.randn(tokens, columns, device=machine.device).bfloat16()
    bias = torch.randn(rows, device=machine.device).bfloat16()
    fragments, held, codes = pack_fragments(packed), None, None
    if name == "library":
        name, held, codes = compressed(machine, packed)

    def product() -> torch.Tensor:
        # What is not written shows.
        torch.full((tokens * rows,), float("nan"), dtype=x.dtype, device=machine.device)
        if name == "triton":
            from sparsify.runtime.cuda import triton_kernels

            return triton_kernels.linear(x, packed.values, packed.codes, bias)
        return run_kernel(name, x, fragments, held, codes, rows, bias)

    y, exact = product(), x.double() @ unpack(packed).double().t() + bias.double()
    found = error(y, exact)
    if not found < BAR:
        raise RuntimeError(f"{name} of {tokens} tokens with {rows}×{columns} is {found:.2e} off")
    if not torch.equal(y, product()):
        raise RuntimeError(f"{name} of {tokens} tokens with {rows}×{columns} gives other bits the second time")
    return found


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def compressed(machine: Machine, packed: Packed) -> tuple[str, Tensor, Tensor | None]:
    """The kernel of NVIDIA's library for this GPU, and a matrix as that takes it."""
    library = machine.gpu.library
    if library is None:
        raise RuntimeError("this torch has neither cuSPARSELt nor CUTLASS for this GPU")
    return "cutlass" if library == "cutlass" else "cusparselt:0", *libraries.compress(packed, library)


def capture(machine: Machine, name: str) -> Found:
    """A kernel in a CUDA graph, on two matrices in turns: what every time of the later parts leans on."""
    size = machine.sizes.square
    packed = [random_24(size, size, torch.bfloat16, machine.device) for _ in range(2)]
    x = torch.randn(8, size, device=machine.device).bfloat16()
    calls = []
    for matrix in packed:
        own, held, codes = compressed(machine, matrix) if name == "library" else (name, None, None)
        calls.append(partial(run_kernel, own, x, to_fragments(matrix), held, codes, size))
    return {"micro": 1e6 * machine.clock.seconds(calls)}


def ceilings(machine: Machine) -> Found:
    """What this card moves and multiplies: bytes of a copy, read and written, and a dense product's operations."""
    count = 1 << 12 if machine.emulated else 1 << 31
    source = torch.randint(255, (count,), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    size = 64 if machine.emulated else 8192
    a, b = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
    copied = machine.clock.seconds([lambda: target.copy_(source)])
    multiplied = machine.clock.seconds([lambda: a @ b])
    return {"copy_tb_s": 2 * count / copied / 1e12, "dense_tflop_s": 2 * size**3 / multiplied / 1e12}
