"""The CUDA kernels without a GPU: their source run by the emulator, and the machine code that compilers make of it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import emulate
from support.machine_code import machine_code
from support.matrices import error, pruned_24
from torch import Tensor

from sparsify.runtime.cuda import nvrtc
from sparsify.runtime.cuda.fragments import to_fragments
from sparsify.runtime.cuda.variants import BULK, DECODE, HOPPER, INTEGERS, MANY, TILED, VARIANTS, WGMMA, WIDE, Variant
from sparsify.runtime.layout import pack

DTYPES = (torch.bfloat16, torch.float16)
SPLIT = (
    Variant("tiled", 8, 2, 8, 2),
    Variant("tiled", 4, 1, 4, 3, early=True),
    Variant("decode", 8, 1, 1, 2),
    Variant("decode", 8, 2, 2, 4, early=True),
    Variant("bulk", 8, 1, 2, 2, early=True),
    Variant("bulk", 4, 1, 1, 4),
    Variant("wide", 8, 4, 8, 3, early=True),
    Variant("wide", 8, 2, 4, 2),
    Variant("wgmma", 12, 1, 8, 3, early=True),
    Variant("wgmma", 12, 2, 16, 2),
    Variant("wgmma", 16, 1, 16, 4),
)
EARLY = tuple(replace(v, early=True) for v in (DECODE[0], BULK[0], TILED[0], WIDE[0], WGMMA[0]))


def weight(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dense = pruned_24(rows, columns, dtype, seed=rows)
    dense.view(-1)[torch.randperm(dense.numel())[: dense.numel() // 10]] = 0
    return dense, to_fragments(pack(dense, "packed24"))


def check(variant: Variant, dtype: torch.dtype, shape: tuple[int, int], tokens: int) -> None:
    dense, fragments = weight(*shape, dtype)
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    exact = x.double() @ dense.double().t()
    y = emulate.linear(variant, x, fragments, shape[0], bias)
    assert error(y, exact + bias.double()) < 4e-3, (variant.name, dtype, shape, tokens)
    # Threads in the other order: a missing barrier shows.
    assert torch.equal(y, emulate.linear(variant, x, fragments, shape[0], bias, backwards=True))
    if tokens < 16:
        assert error(emulate.linear(variant, x, fragments, shape[0]), exact) < 4e-3


QUICK = (
    DECODE[0],
    DECODE[-1],
    BULK[0],
    BULK[-1],
    TILED[0],
    TILED[-1],
    SPLIT[1],
    SPLIT[3],
    SPLIT[4],
    SPLIT[6],
    WIDE[0],
    EARLY[1],
    WGMMA[0],
    WGMMA[-1],
    SPLIT[8],
    SPLIT[9],
)
CASES = [
    *((variant, torch.bfloat16) for variant in QUICK),
    (SPLIT[1], torch.float16),
    (SPLIT[4], torch.float16),
    (SPLIT[8], torch.float16),
    *(
        pytest.param(v, torch.bfloat16, marks=pytest.mark.slow)
        for v in (*VARIANTS, *SPLIT, *EARLY)
        if v not in (*QUICK, *INTEGERS)
    ),
]
# Seven row tiles: blocks that stay (two or three of them, see emulate.MULTIPROCESSORS) go on to others, with more tiles
# than a ring of copies has places.
SHAPES = (((16, 256), (1, 7, 16)), ((7, 64), (3, 9, 33)), ((100, 840), (2, 16, 70)), ((36, 2048), (5,)))


@pytest.mark.first(6)
@pytest.mark.parametrize(("variant", "dtype"), CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_against_float64_on_ragged_shapes(variant: Variant, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape, counts in SHAPES:
        # A tiled kernel does as much for one token as for its whole tile of them.
        for tokens in counts[-1:] if variant.kind in MANY else counts:
            if variant.fits(tokens, shape[1]):
                check(variant, dtype, shape, tokens)


def test_unpacking_is_exact() -> None:
    for dtype in DTYPES:
        for rows, columns in ((16, 256), (7, 64), (100, 1096)):
            dense, fragments = weight(rows, columns, dtype)
            assert torch.equal(emulate.unpacked(fragments, dtype, 0, rows, columns), dense + 0)
        assert torch.equal(emulate.unpacked(fragments, dtype, 32, 20, columns), dense[32:52] + 0)


def test_values_that_floats_have_beside_numbers() -> None:
    """Infinities of inputs reach exactly the output neurons that have a weight there."""
    dense, fragments = weight(32, 256, torch.bfloat16)
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    x[0, 77] = float("inf")
    y = emulate.linear(DECODE[0], x, fragments, 32)
    kept = dense[:, 77] != 0
    assert bool(y[0, kept].isinf().all()) and kept.any() and not kept.all()


# Machine code.


def check_machine_code(binary: Path, capability: tuple[int, int]) -> None:
    kernels, hopper = machine_code(binary), capability >= HOPPER
    assert set(kernels) == {v.kernel for v in VARIANTS if v.runs_on(capability)} | {
        *("add_splits", "unpack", "unpack_int8", "unpack_int4")
    }
    for name, words in kernels.items():
        assert not [w for w in words if w.startswith(("LDL", "STL"))], f"{name} spills registers to local memory"
        # Each waits for the kernel before it, and does so before its first load of anything.
        first = min(i for i, w in enumerate(words) if w.startswith(("LDG", "UBLKCP")))
        assert ("ACQBULK" in words[:first]) == hopper, name
        if name == "add_splits":
            continue
        loads = [w for w in words if w.split(".")[0] == "LDG"]
        wide = [w for w in loads if w.endswith(".128") or ".128." in w]
        if "int" in name:
            check_integer_code(name, loads, words)
            continue
        if name.startswith("wgmma"):
            check_warpgroup_code(Variant.named(name), words)
            continue
        # Nine 16-byte loads are one tile of weights. The bias is two bytes, and no more than that is narrow.
        if name.startswith(("bulk", "wide")):
            assert sum(w.startswith("UBLKCP.S.G") for w in words) >= 2, f"{name} has no bulk copies"
            # Nine 16-byte loads are one tile; a warp of the wide ones takes half of it, and inputs as matrices.
            shared = sum(w.startswith("LDS.") and "128" in w for w in words)
            variant = Variant.named(name)
            assert shared >= (4 * variant.row_tiles if variant.kind == "wide" else 9), name
            matrices = sum(w.startswith("LDSM") and w.endswith(".4") for w in words)
            assert matrices >= 4 * variant.token_tiles or variant.kind == "bulk", name
        else:
            assert len(wide) >= 9, (name, loads)
        assert all(".U16" in w for w in loads if w not in wide), (name, loads)
        if name != "unpack":
            products = [w for w in words if w.startswith("HMMA.SP.16832.F32")]
            variant = Variant.named(name)
            # One per chunk, row tile and token tile of a tile of weights.
            assert len(products) >= (4 if variant.kind == "wide" else 8) * variant.row_tiles * variant.token_tiles, (
                name,
                len(products),
            )
        if name.startswith("tiled"):
            assert any(w.startswith("LDGSTS") and "128" in w for w in words), f"{name} has no asynchronous copies"


def check_integer_code(name: str, loads: list[str], words: list[str]) -> None:
    """Weights sixteen bytes at a time, scales four at least, and two values decoded by one subtraction."""
    bits, products = int(name.partition("int")[2][0]), [w for w in words if w.startswith("HMMA.SP.16832.F32")]
    assert sum("128" in w and "CONSTANT" in w for w in loads) >= bits // 2 + 1, (name, loads)
    assert sum(w.endswith("U16") for w in loads) <= 1, "the bias"
    if not name.startswith("unpack"):
        decoded = sum(w.split(".")[0] in ("HFMA2", "HADD2") for w in words)
        assert 32 <= decoded < 64, (name, decoded)
        # A compiler may begin the next turn of the loop early with one of its products; it has no second loop.
        least = 8 * Variant.named(name).token_tiles
        assert least <= len(products) < 2 * least, (name, len(products))


def check_warpgroup_code(variant: Variant, words: list[str]) -> None:
    """Products that run beside the warps: where a compiler cannot prove that it need not, it waits for each of them."""
    products = [w for w in words if w.startswith("HGMMA.SP")]
    # One per chunk and row tile, and a wait for those of each step before, which are two chunks where registers allow.
    steps = 8 * variant.row_tiles // (1 if variant.row_tiles * variant.token_tiles > 16 else 2)
    assert len(products) == 8 * variant.row_tiles
    assert {w.split(".")[2] for w in products} == {f"64x{8 * variant.token_tiles}x32"}, products
    assert sum(w.startswith("WARPGROUP.DEPBAR") for w in words) == steps + 1, variant.name
    assert sum(w.startswith("WARPGROUP.ARRIVE") for w in words) == steps, variant.name
    assert sum(w.startswith("UBLKCP.S.G") for w in words) >= 2, "weights by bulk copies"
    assert any(w.startswith("LDGSTS") and "128" in w for w in words), "inputs by asynchronous copies"


ARCHITECTURES = ((8, 0), (9, 0), (10, 0))


def each(quick: tuple[tuple[int, int], torch.dtype]) -> list[Any]:
    """Every architecture in every dtype; all but one are slow."""
    every = [(capability, dtype) for capability in ARCHITECTURES for dtype in DTYPES]
    return [
        pytest.param(c, d, id=f"sm_{c[0]}{c[1]}-{nvrtc.TYPES[d]}", marks=[] if (c, d) == quick else pytest.mark.slow)
        for c, d in every
    ]


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), each(((9, 0), torch.bfloat16)))
def test_what_nvcc_makes_of_it(tmp_path: Path, capability: tuple[int, int], dtype: torch.dtype) -> None:
    nvcc, name = shutil.which("nvcc"), f"sm_{capability[0]}{capability[1]}"
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    if name not in known.split():
        pytest.skip(f"this nvcc does not know {name}")
    name += "a" * (capability == HOPPER)
    words = [nvcc, "-std=c++17", "-O3", f"-arch={name}", f"-DSPARSIFY_TYPE={nvrtc.TYPES[dtype]}", "-cubin"]
    subprocess.run([*words, "-o", tmp_path / "k.cubin", nvrtc.SOURCES / nvrtc.MAIN], check=True)
    check_machine_code(tmp_path / "k.cubin", capability)


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), each(((8, 0), torch.float16)))
def test_what_nvrtc_makes_of_it(
    tmp_path: Path, capability: tuple[int, int], dtype: torch.dtype, compiler: nvrtc.NVRTC
) -> None:
    if 10 * capability[0] + capability[1] not in compiler.architectures:
        pytest.skip(f"this NVRTC does not know sm_{capability[0]}{capability[1]}")
    (tmp_path / "k.cubin").write_bytes(compiler.compile(dtype, capability))
    check_machine_code(tmp_path / "k.cubin", capability)


@pytest.mark.slow
def test_a_gpu_that_nvrtc_does_not_know_gets_ptx(compiler: nvrtc.NVRTC) -> None:
    code = compiler.compile(torch.bfloat16, (99, 0))
    assert b".target" in code and b"mma.sp::ordered_metadata" in code


def test_compiled_once_then_read_from_the_cache_folder(
    compiler: nvrtc.NVRTC, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[torch.dtype, tuple[int, int]]] = []

    def compile(self: nvrtc.NVRTC, dtype: torch.dtype, capability: tuple[int, int]) -> bytes:
        made.append((dtype, capability))
        return f"code {len(made)}".encode()

    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc.NVRTC, "compile", compile)
    assert nvrtc.machine_code(torch.bfloat16, (9, 0)) == b"code 1"
    assert nvrtc.machine_code(torch.bfloat16, (9, 0)) == b"code 1"
    assert nvrtc.machine_code(torch.float16, (9, 0)) == b"code 2"
    assert made == [(torch.bfloat16, (9, 0)), (torch.float16, (9, 0))]
