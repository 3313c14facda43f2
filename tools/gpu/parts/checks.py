"""Every kernel against float64, and everything around one: policies, CUDA graphs, streams, threads, torch.compile."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from machine import Found, Machine, Step, families_of
from results import FAILED, Results
from torch import Tensor

from parts.first import BAR, error
from sparsify.errors import Refused
from sparsify.runtime.cuda.autotune.times import random_24
from sparsify.runtime.cuda.integers import GRIDS, IntegerGrid, pack_fragments
from sparsify.runtime.cuda.prepared import PreparedWeight, prepare_weight
from sparsify.runtime.cuda.products import run_kernel
from sparsify.runtime.cuda.variants import BULK, CLUSTERS, DECODE, INTEGERS, VARIANTS, WGMMA, WIDE, Variant
from sparsify.runtime.layout import unpack
from sparsify.runtime.words import POLICIES, Policy


def steps(machine: Machine, results: Results) -> list[Step]:
    broken = broken_families(results)
    return [
        *(
            (f"{kernel.name} {'×'.join(map(str, shape))}", partial(check_variant, machine, kernel, shape))
            for shape in machine.sizes.checked
            for kernel in every_variant(machine, broken)
        ),
        *((f"integers {grid.kind}", partial(check_policy, machine, "decode", grid)) for grid in GRIDS),
        *((f"policy {policy}", partial(check_policy, machine, policy)) for policy in POLICIES),
        ("CUDA graphs", partial(check_graphs, machine)),
        ("streams", partial(check_streams, machine)),
        ("threads", partial(check_threads, machine)),
        ("torch.compile", partial(check_compile, machine)),
        ("every GPU", partial(check_other_gpus, machine)),
    ]


def broken_families(results: Results) -> set[str]:
    """Those that part ``first`` found broken."""
    return {name for name, found in results.part("first").items() if FAILED in found}


def every_variant(machine: Machine, broken: set[str]) -> list[Variant]:
    plain = [replace(v, early=early) for v in VARIANTS for early in (False, True) if v.kind != "wgmma" or not early]
    split = [replace(v, splits=s) for v in VARIANTS for s in (2, 4) if v.kind == "tiled"]
    split += [replace(v, splits=s, early=s == 2) for v in (*DECODE, *BULK, *INTEGERS[::3]) for s in CLUSTERS[1:]]
    split += [replace(v, splits=s, early=s == 3) for v in WIDE for s in (2, 3, 5, 8)]
    split += [replace(v, splits=s, early=s == 3) for v in WGMMA for s in (3, 8)]
    return [v for v in plain + split if v.runs_on(machine.gpu.capability) and not broken & families_of(v.name)]


def within(found: float, *what: object) -> float:
    if not found < BAR:
        raise AssertionError(f"{what} is {found:.2e} off")
    return found


def check_variant(
    machine: Machine,
    variant: Variant,
    shape: tuple[int, int],
    counts: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16),
) -> Found:
    """At every number of tokens that it takes."""
    (rows, columns), worst, count = shape, 0.0, 0
    for dtype in dtypes:
        packed = random_24(rows, columns, dtype, machine.device, variant.grid)
        dense, fragments = unpack(packed).double(), pack_fragments(packed)
        bias = torch.randn(rows, device=machine.device).to(dtype)
        for tokens in counts or machine.sizes.checked_tokens:
            if not variant.fits(tokens, columns):
                continue
            x = torch.randn(tokens, columns, device=machine.device).to(dtype)
            torch.full((tokens * rows,), float("nan"), dtype=dtype, device=machine.device)
            y = run_kernel(variant.name, x, fragments, None, None, rows, bias)
            exact = x.double() @ dense.t() + bias.double()
            worst = max(worst, within(error(y, exact), variant.name, dtype, shape, tokens))
            if not torch.equal(y, run_kernel(variant.name, x, fragments, None, None, rows, bias)):
                raise AssertionError(f"{variant.name} of {tokens} tokens gives other bits the second time")
            count += 1
    return {"products": count, "worst": worst}


def check_policy(machine: Machine, policy: Policy, grid: IntegerGrid | None = None) -> Found:
    """The operator at any number of tokens, and the matrix that comes back."""
    size = machine.sizes.square
    packed = random_24(size, size, torch.bfloat16, machine.device, grid)
    weight = prepare_weight(packed, policy, tune=False, target=machine.target)
    if isinstance(weight, Refused):
        return {"refused": weight.reason}
    dense, worst = unpack(packed), 0.0
    for shape in ((0, size), (1, size), (3, 5, size), (16, size), (100, size), (1000, size)):
        x, bias = (torch.randn(s, device=machine.device).bfloat16() for s in (shape, (size,)))
        torch.full((max(1, x.numel()),), float("nan"), dtype=x.dtype, device=machine.device)
        y = weight.linear(x, bias)
        if x.numel():
            exact = x.double() @ dense.double().t() + bias.double()
            worst = max(worst, within(error(y, exact), policy, shape))
    if not torch.equal(unpack(weight.portable()), dense):
        raise AssertionError(f"{policy}: another matrix comes back")
    return {"plan": str(weight.plan), "worst": worst}


def _prepared(machine: Machine) -> tuple[Tensor, PreparedWeight]:
    packed = random_24(machine.sizes.square, machine.sizes.square, torch.bfloat16, machine.device)
    weight = prepare_weight(packed, tune=False, target=machine.target)
    if isinstance(weight, Refused):
        raise AssertionError(weight.reason)
    return unpack(packed), weight


def _inputs(machine: Machine, tokens: int) -> Tensor:
    return torch.randn(tokens, machine.sizes.square, device=machine.device).bfloat16()


def check_graphs(machine: Machine) -> Found:
    _, weight = _prepared(machine)
    # The kernels that start early lean on what came before: chains of products show it.
    for plan in (None, *(["8:bulk_w8_r1_m1_e,16:decode_w8_r1_m2_s2_e,*:tiled_w8_r1_m4_s2_e"] * machine.gpu.hopper)):
        for tokens in (1, 16, 100, 600):
            x = _inputs(machine, tokens)
            chain = weight if plan is None else replace(weight, plan=type(weight.plan).parse(plan))
            wanted = weight.linear(weight.linear(x))
            got = machine.replayed(lambda x=x, chain=chain: chain.linear(chain.linear(x)))  # type: ignore[misc]
            within(error(got, wanted.double()), "a CUDA graph", plan, tokens)
    return {}


def check_streams(machine: Machine) -> Found:
    _, weight = _prepared(machine)
    for tokens in (1, 16, 100, 600):
        x = _inputs(machine, tokens)
        if not torch.equal(machine.elsewhere(partial(weight.linear, x)), weight.linear(x)):
            raise AssertionError(f"another stream gives other numbers for {tokens} tokens")
    return {}


def check_threads(machine: Machine) -> Found:
    _, weight = _prepared(machine)
    x, results = _inputs(machine, 4), list[Tensor]()
    thread = threading.Thread(target=lambda: results.append(weight.linear(x)))
    thread.start()
    thread.join()
    if not results or not torch.equal(results[0], weight.linear(x)):
        raise AssertionError("another thread gives other numbers, or none")
    return {}


def check_compile(machine: Machine) -> Found:
    dense, weight = _prepared(machine)
    bias = torch.randn(machine.sizes.square, device=machine.device).bfloat16()

    def two(x: Tensor) -> Tensor:
        return weight.linear(torch.relu(weight.linear(x, bias)))

    compiled = machine.compiled(two)
    with torch.inference_mode():
        for _ in range(4):
            x = _inputs(machine, 1)
            exact = torch.relu(x.double() @ dense.double().t() + bias.double()) @ dense.double().t()
            within(error(compiled(x).clone(), exact) / 2, "torch.compile")
    return {}


def check_other_gpus(machine: Machine) -> Found:
    count = 0 if machine.emulated else torch.cuda.device_count()
    for number in range(1, count):
        there = random_24(machine.sizes.square, machine.sizes.square, torch.bfloat16, torch.device("cuda", number))
        second = prepare_weight(there, tune=False)
        if isinstance(second, Refused):
            raise AssertionError(second.reason)
        x = torch.randn(4, machine.sizes.square, device=there.values.device).bfloat16()
        within(error(second.linear(x), x.double() @ unpack(there).double().t()), f"GPU {number}")
    return {"others": max(0, count - 1)}
