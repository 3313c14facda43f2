"""Stacks of experts of which only some may be pruned, or only some saw a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.families import build, inputs, save
from support.pruning import fresh

import sparsify
from sparsify.calibration.measuring import measure_inputs
from sparsify.context import Context
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program
from sparsify.method.pattern import NM, Unstructured
from sparsify.prune.allocation import Measured
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose
from sparsify.prune.turn import prune_without_data

STACK = "model.layers.0.mlp.experts.gate_up_proj"
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1"


def test_what_is_told_of_a_stack_is_what_is_there_after_some_of_it_was_pruned(
    captured: Callable[[str], Program],
) -> None:
    """One of the eight matrices of the stack loses half of its weights: 15/16 of them stay."""
    program = fresh(captured("mixtral"))
    before = program.weights.read(STACK)
    targets, _ = choose(program, NM(2, 4), Wanted.of(program.weights, only=[EXPERT]))
    method = sparsify.parse_pass("magnitude:2:4")
    (site,) = prune_without_data(program, {STACK: method}, targets, Context())  # type: ignore[dict-item]
    after = program.weights.read(STACK)
    assert site.sources == [f"{EXPERT}.weight"] and site.kept == 15 / 16
    assert float((after != 0).float().mean()) == 15 / 16
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]]) and not torch.equal(after[1], before[1])


def test_what_is_ignored_of_a_stack_stays(tmp_path: Path) -> None:
    """All but one of the experts ignored, with data: they keep every byte, and the rest is pruned as ever."""
    dense = save("mixtral", tmp_path / "dense")
    others = [f"*.experts.{number}.*" for number in (0, 2, 3)]
    batch, made = [inputs("mixtral", rows=4)], {}
    for name, ignored in (("some", others), ("all", [])):
        made[name] = sparsify.compile(
            dense, ["wanda:2:4"], calibration=batch, schedule="dense", ignore=ignored, output=tmp_path / name
        )
    before, some, every = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "some", "all"))
    for name, tensor in before.items():
        expected = tensor if any(f"experts.{number}." in name for number in (0, 2, 3)) else every[name]
        assert torch.equal(some[name], expected), name
    kept = {s.parameter: s.kept for s in made["some"].runs[0].sites}
    assert kept[STACK] == 7 / 8 and kept["model.layers.0.self_attn.q_proj.weight"] == 0.5


def test_an_expert_without_tokens_is_scored_by_its_weights() -> None:
    """For allocations: |W| itself, in the place of |W|·‖X‖ with a norm that nobody measured."""
    model = build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # every token to the same two
    batch = inputs("mixtral", rows=2)
    program = capture(open_source(model), batch)
    targets, _ = choose(program, Unstructured("0.5"), Wanted())
    target = next(t for t in targets if t.parameter == STACK)
    recorders = measure_inputs(program, target.sites, [batch], ("squared_norm",), Context())
    seen = recorders[STACK].tokens
    assert sorted(seen) == [0, 0, 32, 32]
    pairs = Measured(program, recorders, 2, torch.device("cpu")).scores(target)
    for count, (weight, scores) in zip(seen, pairs, strict=True):
        assert torch.equal(scores, weight.abs()) == (count == 0)


@pytest.mark.parametrize("allocation", ["owl", "error"])
def test_an_allocation_with_experts_that_saw_nothing(allocation: str) -> None:
    model = build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    spec = f"wanda:50%,allocation={allocation}"
    result = sparsify.compile(model, [spec], calibration=[inputs("mixtral", rows=2)])
    for site in result.runs[0].sites:
        if "experts" in site.name:
            assert len(site.without_data) == 2 and 0.35 < site.kept < 0.65
