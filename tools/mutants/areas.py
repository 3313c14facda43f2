"""What is mutated, and which tests should see it: quick ones, those of the module first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Area:
    """Files and folders of the package, by their paths in a plain install; arguments of pytest."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]


# Of the schedules: those that are quick.
SCHEDULES = tuple(
    f"tests/prune/test_schedules.py::{name}"
    for name in (
        "test_each_schedule_by_hand", "test_a_weight_used_repeatedly_is_pruned_once_with_merged_statistics",
        "test_schedule_dense_goes_on_with_a_dense_shared_weight", "test_what_an_observer_is_told",
        "test_experts_that_no_token_reached_fall_back_to_magnitude_and_are_listed",
        "test_statistics_of_experts_are_those_of_their_own_tokens", "test_the_error_is_exact_where_the_tokens_are_few",
        "test_a_nan_activation_names_the_site", "test_batches_of_equal_shape_and_other_content_all_count",
    )
)  # fmt: skip
# Those that need no folder of another backend.
LEDGER = (
    "test_a_header_that_says_another_dtype_is_seen", "test_weights_that_the_manifest_does_not_know",
    "test_a_manifest_of_another_form", "test_inspecting_reads_no_weight_and_still_sees_a_config_that_changed",
)  # fmt: skip
BOUNDS = (
    "test_a_config_that_asks_for_more_than_there_is", "test_a_model_that_grows_while_it_is_built_is_stopped",
    "test_what_is_computed_and_not_read_may_not_fill_the_memory", "test_a_link_to_elsewhere_is_not_followed",
)  # fmt: skip
# torch.compile takes longer than all the rest.
COMPILED = ("test_a_language_model_lifted_by_torch_compile", "test_the_backend_of_torch_compile")

AREAS = {
    "selection": Area(
        ("sparsify/method/selection.py", "sparsify/method/pattern.py"),
        ("tests/method/test_selection.py", "tests/method/test_selection_sizes.py", "tests/method/test_pattern.py"),
    ),
    "engine": Area(
        ("sparsify/prune",),
        ("tests/prune/test_verify.py", "tests/prune/test_turn.py", "tests/prune/test_experts_in_part.py",
         "tests/prune/test_targets.py", "tests/prune/test_allocation.py", "tests/prune/test_fx_pass.py",
         "tests/prune/test_refusals.py", *SCHEDULES),
    ),
    "calibration": Area(
        ("sparsify/calibration",),
        ("tests/calibration", "tests/passes/test_twin.py", *SCHEDULES),
    ),
    "checkpoint": Area(
        ("sparsify/files/checkpoint.py", "sparsify/files/writer.py", "sparsify/files/ledger.py", "sparsify/tensors.py",
         "sparsify/finite.py", "sparsify/backends/hf"),
        ("tests/files/test_checkpoint.py", "tests/files/test_sizes.py", "tests/test_finite.py", "tests/backends/hf",
         "tests/hostile/test_nan.py::test_masks_in_old_checkpoints", "tests/hostile/test_nan.py::test_in_every_dtype",
         *(f"tests/hostile/test_bytes.py::{name}" for name in LEDGER)),
    ),
    "staging": Area(
        ("sparsify/files/staging.py", "sparsify/files/ownership.py", "sparsify/durable.py"),
        ("tests/files/test_staging.py", "tests/files/test_durable.py", "tests/files/test_modes.py",
         "tests/files/test_scratch.py", "tests/backends/hf/test_hf.py"),
    ),
    "source": Area(
        ("sparsify/frontend/source.py", "sparsify/frontend/skeleton.py", "sparsify/frontend/matching.py",
         "sparsify/frontend/building/bounds.py"),
        ("tests/frontend/test_source.py", "tests/frontend/test_matching.py",
         "tests/hostile/test_nan.py::test_a_module_keeps_its_dtype",
         "tests/hostile/test_nan.py::test_a_module_and_its_buffers",
         *(f"tests/hostile/test_folders.py::{name}" for name in BOUNDS)),
    ),
    "weights": Area(
        ("sparsify/ir/weights.py", "sparsify/ir/store.py"),
        ("tests/ir/test_weights.py", "tests/files/test_checkpoint.py", "tests/frontend/test_matching.py",
         "tests/prune/test_experts_in_part.py"),
    ),
    "passes": Area(
        ("sparsify/passes/wanda.py", "sparsify/passes/gblm.py", "sparsify/passes/activation.py",
         "sparsify/passes/sparsegpt.py", "sparsify/passes/alps.py", "sparsify/passes/apt.py",
         "sparsify/passes/solvers/fitting.py", "sparsify/passes/solvers/scored.py", "sparsify/passes/gradient.py",
         "sparsify/passes/llm_pruner.py", "sparsify/passes/twin.py", "sparsify/passes/solvers"),
        ("tests/passes", "--ignore=tests/passes/test_lower_sparse.py", "--ignore=tests/passes/test_all_methods.py"),
    ),
    "packed": Area(
        ("sparsify/runtime/layout.py", "sparsify/runtime/codes.py", "sparsify/runtime/packed_weight.py",
         "sparsify/runtime/soundness.py", "sparsify/runtime/reference.py", "sparsify/runtime/arguments.py",
         "sparsify/runtime/cpu/products.py", "sparsify/backends/packed/format.py", "sparsify/backends/packed/plan.py",
         "sparsify/backends/packed/store.py", "sparsify/backends/packed/config.py", "sparsify/passes/lowering",
         "sparsify/analysis/contraction.py"),
        ("tests/runtime/test_layout.py", "tests/runtime/test_sizes.py", "tests/runtime/test_ops.py",
         "tests/hostile/test_operators.py", "tests/analysis/test_contraction.py",
         "tests/backends/packed/test_hostile.py", "tests/backends/packed/test_report.py",
         "tests/backends/packed/test_refusals.py",
         "tests/passes/test_lower_sparse.py",
         *(f"--deselect=tests/passes/test_lower_sparse.py::{name}" for name in COMPILED)),
    ),
}  # fmt: skip
