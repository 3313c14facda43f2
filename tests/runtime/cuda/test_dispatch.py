"""Which kernel serves how many tokens: plans, defaults, and what is made of measured times, with a clock that is not
one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.gpus import A100, H200
from support.matrices import pruned_24

from sparsify.errors import BackendError, Refused, SpecError
from sparsify.runtime.cuda.autotune.measure import RacedMatrix, measure, own_candidates
from sparsify.runtime.cuda.autotune.times import TimesFile, random_24
from sparsify.runtime.cuda.compressed import SparseLibrary
from sparsify.runtime.cuda.dispatch import BUCKETS, LEAST, Plan, Timings, default_plan
from sparsify.runtime.cuda.gpu import GPU
from sparsify.runtime.cuda.prepared import NO_COMPILER, PreparedWeight, prepare_weight
from sparsify.runtime.cuda.variants import BULK, DECODE, TILED, WIDE, Variant
from sparsify.runtime.layout import Packed, holds_24, pack, unpack
from sparsify.runtime.soundness import check
from sparsify.runtime.words import POLICIES, Policy

KERNELS = st.sampled_from(
    [
        "unpack",
        "cutlass",
        "cusparselt:0",
        "cusparselt:31",
        "cusparselt:12:4:1",
        *(v.name for v in TILED + WIDE),
        "tiled_w8_r2_m8_s4_e",
        "wide_w8_r4_m8_s3_e",
    ]
)


@given(
    st.lists(st.tuples(st.integers(1, 1 << 20), KERNELS), min_size=1, max_size=8, unique_by=lambda step: step[0]),
    st.integers(1, 1 << 21),
)
def test_plans_survive_being_text(steps: list[tuple[int, str]], tokens: int) -> None:
    steps.sort()
    plan = Plan.of(steps)
    assert Plan.parse(str(plan)) == plan
    wanted = next((kernel for limit, kernel in steps if tokens <= limit), steps[-1][1])
    assert plan.kernel(tokens) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "*:",
        "*:fast",
        "8:unpack",
        "16:unpack,8:unpack,*:unpack",
        "0:unpack,*:unpack",
        "x:unpack,*:unpack",
        "*:decode_w8_r1_m1",
        "16:decode_w8_r1_m1,*:unpack",
        "*:cusparselt",
        "*:cusparselt:-1",
        "*:cusparselt:1:2",
        "*:cusparselt:01",
        "*:cusparselt:1:1:0",
        "*:wide_w8_r4_m8_s9",
        "*:wgmma_w12_r1_m8_s9",
        "*:wgmma_w12_r2_m32",
        "*:tiled_w8_r2_m8_s",
        "*:tiled_w8_r2_m8_s65",
        "8:decode_w8_r1_m1_s3,*:unpack",
        "8:decode_w8_r1_m1_s1,*:unpack",
        "8:decode_w8_r1_m1_e_s2,*:unpack",
        "8:decode_w8_r1_m1_s2_s2,*:unpack",
        "16:bulk_w8_r1_m1,*:unpack",
        "*:bulk_w8_r1_m2",
        "8:bulk_w16_r1_m1,*:unpack",
        "*:dense",
    ],
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(BackendError):
        Plan.parse(text)


@pytest.mark.parametrize("rows", [16, 100, 1024, 4096, 12288, 28672])
@pytest.mark.parametrize("columns", [64, 4096, 14336])
def test_defaults_serve_every_count(rows: int, columns: int) -> None:
    cases: list[tuple[Policy, SparseLibrary | None]]
    cases = [("decode", None), ("both", "cusparselt"), ("both", "cutlass"), ("prefill", "cutlass")]
    for (policy, library), capability in product(cases, ((8, 0), (9, 0), (10, 0))):
        plan = Plan.parse(str(default_plan(rows, columns, policy, library, 132, capability)))
        for tokens in (1, 2, 8, 9, 16, 17, 100, 257, 5000):
            kernel = plan.kernel(tokens)
            if kernel.startswith(("decode", "tiled", "wgmma")):
                variant = Variant.named(kernel)
                assert policy != "prefill" and variant.fits(tokens, columns) and variant.runs_on(capability)
                assert tokens <= 16 or variant.kind == ("wgmma" if capability == (9, 0) else "tiled")
            elif policy == "decode":
                assert kernel == "unpack" and tokens > 256


def test_what_hopper_takes_unmeasured_is_what_won_there() -> None:
    """On an H200: docs/benchmarks.md."""
    won = {
        (22016, 4096): ("wgmma_w16_r1_m8", "wgmma_w16_r1_m16"),
        (12288, 4096): ("wgmma_w16_r1_m8_s2", "wgmma_w16_r1_m16_s2"),
        (4096, 11008): ("wgmma_w16_r1_m8_s4", "wgmma_w16_r1_m16_s4"),
        (4096, 4096): ("wgmma_w16_r1_m8_s4", "wgmma_w16_r1_m16_s4"),
        (28672, 4096): ("wgmma_w12_r2_m8", "wgmma_w12_r2_m16"),
    }
    for (rows, columns), kernels in won.items():
        plan = default_plan(rows, columns, "decode", None, 132, (9, 0))
        assert (plan.kernel(64), plan.kernel(128)) == kernels


def test_a_count_is_served_as_the_next_that_was_measured() -> None:
    timings = Timings(
        {
            1: {"dense": 10, "decode_w8_r1_m1": 6, "decode_w4_r1_m1": 5},
            8: {"dense": 10, "decode_w8_r1_m1": 6, "decode_w4_r1_m1": 7},
            64: {"dense": 12, "tiled_w8_r2_m8": 14, "unpack": 13},
            2048: {"dense": 300, "unpack": 330},
        }
    )
    plan = timings.plan()
    assert str(plan) == "1:decode_w4_r1_m1,8:decode_w8_r1_m1,*:unpack"
    assert [plan.kernel(t) for t in (1, 2, 8, 9, 9999)] == [
        "decode_w4_r1_m1",
        "decode_w8_r1_m1",
        "decode_w8_r1_m1",
        "unpack",
        "unpack",
    ]
    assert timings.gain(1) == 2 and timings.gain(2048) == pytest.approx(300 / 330)
    assert timings.pays("decode") and not timings.pays("prefill") and timings.pays("both")


def test_a_weight_pays_by_what_its_policy_is_for() -> None:
    slow = Timings({1: {"dense": 9.4, "unpack": 10}, 2048: {"dense": 9.6, "unpack": 10}})
    assert 0.94 < LEAST < 0.96
    assert not slow.pays("decode") and slow.pays("prefill") and slow.pays("both")
    assert Timings({}).pays("decode")


class FakeClock:
    """Times by name. Runs every call, on whatever device it is."""

    def __init__(self, time: Callable[[str, int], float], copies: int = 3) -> None:
        self.time, self.many, self.ran = time, copies, list[tuple[str, int]]()

    def copies(self, read: int, held: int) -> int:
        return self.many

    def seconds(self, calls: Sequence[Callable[[], Any]]) -> float:
        results = [call() for call in calls]
        name, tokens = results[0] if isinstance(results[0], tuple) else ("dense", results[0].shape[0])
        self.ran.append((name, tokens))
        return self.time(name, tokens)


@pytest.mark.slow
def test_what_is_raced_and_what_is_made_of_it() -> None:
    dense = pruned_24(64, 2048, torch.bfloat16)
    packed = pack(dense, "packed24")
    prepared = prepare_weight(packed, "both", target=A100)
    assert isinstance(prepared, PreparedWeight)
    weights = RacedMatrix(dense, prepared.fragments, prepared.compressed, prepared.codes)
    clock = FakeClock(lambda name, tokens: {"dense": 10e-6, "cutlass": 9e-6}.get(name, 5e-6 + 1e-7 * tokens))
    timings = measure(weights, lambda kernel, w: lambda x: (kernel, x.shape[0]), clock, A100)
    assert tuple(timings.micro) == BUCKETS and all("dense" in times for times in timings.micro.values())
    ones = {name for name, tokens in clock.ran if tokens == 1}
    assert ones == {"dense", "cutlass", *(v.name for v in DECODE if v.token_tiles == 1)}
    sixty = {name for name, tokens in clock.ran if tokens == 64}
    assert {"tiled_w8_r2_m8", "tiled_w8_r2_m8_s4", "unpack", "cutlass"} <= sixty and "tiled_w8_r2_m4" not in sixty
    # 2048 columns are eight tiles: a split has two at least.
    assert "tiled_w8_r2_m8_s8" not in sixty
    plan = timings.plan()
    assert plan.kernel(1).startswith("decode") and plan.kernel(32).startswith("tiled") and plan.kernel(64) == "cutlass"


@pytest.mark.parametrize("rows", [64, 1024, 4096, 28672])
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 64, 512, 513])
def test_what_of_ours_is_raced(rows: int, tokens: int) -> None:
    old, new = (own_candidates(tokens, rows, 4096, gpu) for gpu in (A100, H200))
    assert len(set(new)) == len(new) and {*old} == {v for v in new if v.runs_on(A100.capability)}
    for variant in new:
        assert variant.fits(tokens, 4096) and Variant.named(variant.name) == variant
        # Of few tokens no group of eight is empty, and more blocks than the GPU holds twice are not split further.
        launch = variant.launch(tokens, rows, H200.multiprocessors)
        assert tokens > 16 or (8 * (variant.token_tiles - 1) < tokens <= 8 * variant.token_tiles)
        assert launch.cluster == 1 or launch.grid[0] * launch.grid[2] <= 2 * H200.multiprocessors
        assert launch.shared <= 227 << 10 and launch.threads <= 1024
    kinds = {v.kind for v in new}
    assert kinds == ({"decode", "bulk"} if tokens <= 16 else {"tiled", "wide", "wgmma"} if tokens <= 512 else set())
    split = any(v.splits > 1 for v in new)
    assert split == (tokens <= 512 and (rows <= 4096 or tokens > 16)), "rows that leave the GPU idle are split"


def test_blocks_that_stay_fill_the_gpu_once() -> None:
    """As many as find room, each with groups of rows to go on with; no more than there are groups."""
    for variant in BULK:
        for rows in (16, 4096, 28672):
            launch = variant.launch(1, rows, 132)
            assert launch.grid[0] == min(-(-rows // (16 * variant.row_tiles)), 132 * launch.resident)
            # 228 KB, of which the system takes one for each block.
            assert launch.resident * (launch.shared + 1024) <= 228 << 10
    assert [v.launch(1, 64).resident for v in BULK[::2]] == [2, 3, 1]


def test_a_kernel_that_fails_is_left_out_and_said() -> None:
    dense = pruned_24(64, 512, torch.bfloat16)
    prepared = prepare_weight(pack(dense, "packed24"), target=H200)
    assert isinstance(prepared, PreparedWeight)

    def time(name: str, tokens: int) -> float:
        if name.startswith(("tiled", "wide", "wgmma")) or (name == "unpack" and tokens == 32):
            raise RuntimeError(f"{name} cannot run here\nat all")
        return 1e-5

    weights = RacedMatrix(dense, prepared.fragments, None, None)
    with pytest.warns(
        RuntimeWarning, match="tiled_w4_r1_m4 is left out for 32 tokens of 64×512: tiled_w4_r1_m4 cannot"
    ):
        timings = measure(
            weights, lambda kernel, w: lambda x: (kernel, x.shape[0]), FakeClock(time), H200, (16, 32, 64)
        )
    assert {t: set(times) for t, times in timings.micro.items() if t > 16} == {64: {"dense", "unpack"}}
    assert timings.plan().kernel(32) == "unpack"


def test_times_are_kept(tmp_path: Path) -> None:
    times = TimesFile(tmp_path / "deep" / "times.json")
    assert times.get("4096x4096") is None
    timings = Timings({1: {"dense": 7.5, "decode_w8_r1_m1": 4.5}, 64: {"dense": 9.0, "tiled_w8_r2_m8_s2": 8.0}})
    times.put("4096x4096", timings)
    times.put("64x64", Timings({1: {"dense": 1.0, "unpack": 2.0}}))
    assert times.get("4096x4096") == timings and times.get("64x64") is not None
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["times.json"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"k": 3}', '{"k": {"1": {"rm -rf": 1}}}', '{"k": {"x": {}}}', '{"k": {"1": {"unpack": "fast"}}}'],
)
def test_a_damaged_file_of_times_is_measured_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "times.json").write_text(content)
    times = TimesFile(tmp_path / "times.json")
    assert times.get("k") is None
    times.put("k", Timings({1: {"dense": 1.0, "unpack": 2.0}}))
    assert json.loads((tmp_path / "times.json").read_text())["k"]


def test_random_matrices_are_2_of_4() -> None:
    for rows, columns in ((16, 256), (7, 66), (5, 3)):
        packed = random_24(rows, columns, torch.bfloat16, torch.device("cpu"))
        check("random", packed)
        assert unpack(packed).shape == (rows, columns) and holds_24(unpack(packed))


def refused(packed: Packed, policy: Policy = "decode", target: GPU = H200) -> Refused:
    found = prepare_weight(packed, policy, target=target)
    assert isinstance(found, Refused)
    return found


def test_why_a_weight_is_not_prepared() -> None:
    packed = pack(pruned_24(32, 64, torch.bfloat16), "packed24")
    wide = pack(pruned_24(32, 64, torch.float32), "packed24")
    odd = pack(pruned_24(30, 60, torch.bfloat16), "packed24")
    assert "float32" in refused(wide).reason
    assert "2:4" in refused(pack(unpack(packed), "bitmask")).reason
    assert "sparse tensor cores" in refused(packed, target=GPU("V100", (7, 0), 80, True, None)).reason
    waiting = refused(packed, target=GPU("H200", (9, 0), 132, False, "cusparselt"))
    assert "NVRTC" in waiting.reason and waiting.code == NO_COMPILER
    assert "cutlass" in refused(odd, "prefill", A100).reason
    assert "cuSPARSELt" in refused(packed, "prefill", GPU("H200", (9, 0), 132, True, None)).reason
    # For both, what one library does not take is still kept for few tokens.
    both = prepare_weight(odd, "both", target=A100)
    assert isinstance(both, PreparedWeight) and both.compressed is None
    with pytest.raises(SpecError, match="policy"):
        prepare_weight(packed, "fast", target=H200)  # type: ignore[arg-type]


def test_what_a_policy_takes_of_memory() -> None:
    dense = pruned_24(128, 1024, torch.bfloat16)
    packed = pack(dense, "packed24")
    sizes = {}
    for policy in POLICIES:
        weight = prepare_weight(packed, policy, target=A100)
        assert isinstance(weight, PreparedWeight)
        sizes[policy] = weight.nbytes / dense.nbytes
    assert sizes == {"decode": 0.5625, "prefill": 0.5625, "both": 1.125}
