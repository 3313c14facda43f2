"""What is mutated, and which tests should see it: quick ones, those of the module first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Area:
    """Files and folders of the package, by their paths in a plain install; arguments of pytest."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]


# Every family in every schedule: slower than all the rest.
FEWER = "--deselect=tests/prune/test_schedules.py::test_every_family_is_pruned_in_every_schedule"

AREAS = {
    "selection": Area(
        ("sparsify/method/selection.py", "sparsify/method/pattern.py"),
        ("tests/method/test_selection.py", "tests/method/test_selection_sizes.py", "tests/method/test_pattern.py"),
    ),
    "engine": Area(
        ("sparsify/prune",),
        ("tests/prune/test_verify.py", "tests/prune/test_turn.py", "tests/prune/test_experts_in_part.py",
         "tests/prune/test_targets.py", "tests/prune/test_allocation.py", "tests/prune/test_fx_pass.py",
         "tests/prune/test_schedules.py", FEWER),
    ),
    "calibration": Area(
        ("sparsify/calibration",),
        ("tests/calibration", "tests/prune/test_schedules.py", "tests/passes/test_twin.py",
         FEWER),
    ),
    "checkpoint": Area(
        ("sparsify/files/checkpoint.py", "sparsify/files/writer.py", "sparsify/tensors.py", "sparsify/backends/hf"),
        ("tests/files", "tests/backends/hf"),
    ),
    "staging": Area(("sparsify/files/staging.py",), ("tests/files", "tests/backends/hf")),
    "source": Area(
        ("sparsify/frontend/source.py", "sparsify/frontend/skeleton.py", "sparsify/frontend/matching.py"),
        ("tests/frontend/test_source.py", "tests/frontend/test_matching.py", "tests/compiler/test_compile.py"),
    ),
    "weights": Area(
        ("sparsify/ir/weights.py", "sparsify/ir/store.py"),
        ("tests/ir", "tests/files/test_checkpoint.py", "tests/frontend/test_matching.py",
         "tests/prune/test_experts_in_part.py"),
    ),
    "passes": Area(
        ("sparsify/passes/wanda.py", "sparsify/passes/gblm.py", "sparsify/passes/activation.py",
         "sparsify/passes/sparsegpt.py", "sparsify/passes/alps.py", "sparsify/passes/apt.py",
         "sparsify/passes/fitting.py", "sparsify/passes/scored.py", "sparsify/passes/gradient.py",
         "sparsify/passes/llm_pruner.py", "sparsify/passes/twin.py", "sparsify/passes/solvers"),
        ("tests/passes", "--ignore=tests/passes/test_lower_sparse.py", "--ignore=tests/passes/test_all_methods.py"),
    ),
    "packed": Area(
        ("sparsify/runtime/layout.py", "sparsify/runtime/codes.py", "sparsify/runtime/packed_weight.py",
         "sparsify/runtime/soundness.py", "sparsify/runtime/reference.py", "sparsify/runtime/cpu/products.py",
         "sparsify/backends/packed/format.py", "sparsify/backends/packed/plan.py", "sparsify/backends/packed/store.py",
         "sparsify/backends/packed/config.py", "sparsify/passes/lowering", "sparsify/analysis/contraction.py"),
        ("tests/runtime", "tests/analysis/test_contraction.py", "tests/backends/packed",
         "tests/passes/test_lower_sparse.py",
         "--ignore=tests/runtime/cuda", "--ignore=tests/runtime/test_wheel.py"),
    ),
}  # fmt: skip
