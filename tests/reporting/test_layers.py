"""Names of weights as places in a model, and the cells that they make."""

from __future__ import annotations

import math

import pytest

from sparsify.provenance.places import place_of, short_names
from sparsify.reporting.layers import stacks_of

PLACES = {
    "model.layers.3.mlp.down_proj": ("model.layers", "3", "mlp.down_proj"),
    "model.layers.12.mlp.experts.7.w1": ("model.layers", "12", "mlp.experts.*.w1"),
    "encoder.block.0.layer.1.DenseReluDense.wi": ("encoder.block", "0", "layer.*.DenseReluDense.wi"),
    "0.weight": ("", "0", "weight"),
    "h2o.layers.1.q": ("h2o.layers", "1", "q"),
    "lm_head": ("", "", "lm_head"),
    "net.0": ("", "", "net.0"),
    "": ("", "", ""),
}


@pytest.mark.parametrize("name", PLACES)
def test_places(name: str) -> None:
    assert place_of(name) == PLACES[name]


def site(name: str, kept: float = 0.5, error: float | None = 0.1, **more: object) -> dict[str, object]:
    return {"name": name, "shape": [2, 4], "pattern": "2:4", "kept": kept, "error": error, **more}


def test_the_last_pass_that_pruned_a_weight_counts() -> None:
    first = {"sites": [site("m.0.a"), site("m.0.b")], "skipped": [{"name": "m.1.a", "reason": "small"}]}
    second = {"sites": [site("m.0.a", 0.25, 0.3), site("m.1.a")], "skipped": [{"name": "m.0.b", "reason": "no"}]}
    (stack,) = stacks_of([first, second])
    assert stack.blocks == ["0", "1"] and stack.kinds == ["a", "b"]
    assert (stack.cells["0", "a"].kept, stack.cells["0", "a"].error) == (0.25, 0.3)
    assert stack.cells["0", "b"].kept == 0.5 and not stack.cells["0", "b"].left and not stack.cells["1", "a"].left


def test_many_weights_of_one_cell_are_taken_together() -> None:
    sites = [
        site("m.0.e.0.w", 0.5, 0.1),
        {**site("m.0.e.1.w", 0.0, 0.3), "shape": [6, 4]},
        site("m.0.e.2.w", 1.0, None),
    ]
    (stack,) = stacks_of([{"sites": sites}])
    cell = stack.cells["0", "e.*.w"]
    assert cell.kept == pytest.approx((0.5 * 8 + 1.0 * 8) / 40) and cell.error == pytest.approx(0.2)
    (stack,) = stacks_of([{"sites": [site("m.0.a", error=math.nan)]}])
    assert stack.cells["0", "a"].error is None


def test_blocks_are_in_the_order_of_numbers_and_kinds_by_module() -> None:
    sites = [site(f"m.{n}.{kind}") for n in (10, 2) for kind in ("attn.k", "mlp.up")]
    (stack,) = stacks_of([{"sites": sites, "skipped": [{"name": "m.2.attn.q", "reason": "named"}]}])
    assert stack.blocks == ["2", "10"] and stack.kinds == ["attn.k", "attn.q", "mlp.up"]
    assert stack.cells["2", "attn.q"].kept is None and stack.cells["2", "attn.q"].left == {"m.2.attn.q": "named"}


def test_what_is_in_no_block_stands_last() -> None:
    stacks = stacks_of([{"sites": [site("lm_head"), site("m.0.a"), site("v.1.a")]}])
    assert [stack.name for stack in stacks] == ["m", "v", ""]


def test_short_names_tell_apart() -> None:
    assert short_names(["attn.q", "mlp.up", "cross.q"]) == ["attn.q", "up", "cross.q"]
