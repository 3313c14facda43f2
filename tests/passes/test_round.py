"""Rounding to few bits, against loops in float64 and by what it promises: on matrices and on whole models."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support import slow
from support.families import build, inputs
from torch import Tensor, nn

import sparsify
from sparsify.cli.tables import plan_report, result_report
from sparsify.errors import CalibrationError, PatternError, SpecError, VerifyError
from sparsify.method.grids.finding import integers
from sparsify.method.grids.fitting import fit
from sparsify.method.pattern import Grid
from sparsify.method.spec import check_pass, parse_pass, spec_text
from sparsify.passes import Round

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pruned_problem(kind: str = "random", columns: int = 72, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with half of its values zero, in any places, and an input."""
    weight, x = slow.problem(kind, columns=columns, seed=seed)
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return (weight * 0.05).masked_fill(gone, 0), x


def slow_scale(values: list[float], bits: int, symmetric: bool) -> tuple[float, int]:
    """scale=minmax of one group: the smallest scale that clips nothing, as float16, and the smallest integer."""
    least, most, half = min([0.0, *values]), max([0.0, *values]), 2 ** (bits - 1)
    if symmetric:
        low = -half if -least > most else 1 - half
        scale = max(least / low, most / (low + 2**bits - 1))
    else:
        scale = (most - least) / (2**bits - 1)
        low = -round(-least / scale) if scale else 0
    return float(torch.tensor(scale, dtype=torch.float64).half().clamp(min=2.0**-24)), low


def slow_value(value: float, scale: float, low: int, bits: int) -> float:
    return scale * min(max(round(value / scale), low), low + 2**bits - 1)


def column_by_column(weight: Tensor, h: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """GPTQ's loop with an inverse of what is left of H at every column; pruned columns are rounded to zero."""
    w, gone = weight.double().clone(), weight == 0
    grids: list[tuple[float, int]] = []
    for j in range(w.shape[1]):
        if j % group == 0:
            part = w[:, j : j + group].masked_fill(gone[:, j : j + group], 0)
            grids = [slow_scale(row, bits, symmetric) for row in part.tolist()]
        inverse = torch.linalg.inv(h[j:, j:])
        rounded = torch.tensor([slow_value(v, *g, bits) for v, g in zip(w[:, j].tolist(), grids, strict=True)])
        error = (w[:, j] - rounded.double().masked_fill(gone[:, j], 0)) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return w


@pytest.mark.parametrize("spec", ["int8", "int4,group=32", "int3,group=64", "int4,group=32,symmetric=false"])
@pytest.mark.parametrize("kind", ["random", "ill-conditioned", "outliers"])
def test_the_sweep_equals_the_column_loop(kind: str, spec: str) -> None:
    weight, x = pruned_problem(kind)
    h, _ = slow.damped(x)
    own = parse_pass(f"round:{spec},scale=minmax")
    assert isinstance(own, Round)
    result = own.prune(weight, slow.statistics(x)).weight
    expected = column_by_column(weight, h, own.pattern.bits, own.width(72), own.symmetric)
    # In float32 a value between two integers may fall to the other side, and what is right of it follows.
    same = (result.double() - expected).abs() <= 1e-5 * weight.abs().amax()
    assert float(same.double().mean()) >= 0.95
    assert slow.objective(result, weight, h) == pytest.approx(slow.objective(expected, weight, h), rel=0.05)


@pytest.mark.parametrize("spec", ["int8,group=32", "int4", "int3,group=64", "int4,group=32,symmetric=false"])
def test_the_nearest_of_each_by_loops(spec: str) -> None:
    weight, _ = pruned_problem()
    own = parse_pass(f"round:{spec},scale=minmax,compensation=none")
    assert isinstance(own, Round) and not own.needs_data
    result = own.prune(weight, slow.statistics(torch.ones(1, 72, dtype=torch.float64))).weight
    width, bits = own.width(72), own.pattern.bits
    for row, found in zip(weight.double().tolist(), result.tolist(), strict=True):
        for start in range(0, 72, width):
            grid = slow_scale(row[start : start + width], bits, own.symmetric)
            values = [slow_value(v, *grid, bits) for v in row[start : start + width]]
            assert found[start : start + width] == pytest.approx(values, abs=1e-9)


@given(
    bits=st.sampled_from([8, 4, 3]),
    group=st.sampled_from(["32", "64", "128", "row"]),
    options=st.sampled_from(["", ",symmetric=false", ",scale=minmax", ",symmetric=false,scale=minmax"]),
    compensation=st.sampled_from(["sweep", "none"]),
    dtype=st.sampled_from(DTYPES),
    columns=st.sampled_from([1, 31, 64, 100]),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_zeros_stay_and_integers_come_back(
    bits: int, group: str, options: str, compensation: str, dtype: torch.dtype, columns: int, size: float, seed: int
) -> None:
    if bits == 8 and "symmetric=false" in options and dtype == torch.bfloat16:
        return
    weight, x = pruned_problem(columns=columns, seed=seed)
    weight = (weight * size).to(dtype)
    own = parse_pass(f"round:int{bits},group={group}{options},compensation={compensation}")
    assert isinstance(own, Round) and parse_pass(spec_text(own)) == own
    result = own.prune(weight, slow.statistics(x)).weight
    assert result.dtype == dtype and not result[weight == 0].any()
    width = own.width(columns)
    found = integers(result, own.pattern, width, symmetric=own.symmetric)
    assert found is not None and own.broken(result) is None
    scales, whole = found
    assert scales.dtype == torch.float16 and torch.equal(scales.to(dtype).half(), scales)
    each = scales.float().repeat_interleave(width, dim=1)[:, :columns]
    assert torch.equal((each * whole).to(dtype), result)
    for part in whole.split(width, dim=1):
        least, most = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        assert int((most - least).max()) < 2**bits
        if own.symmetric:
            assert int(torch.maximum(most, -least).max()) <= 2 ** (bits - 1)


def test_what_is_off_a_grid_is_told() -> None:
    weight = torch.tensor([[0.5, 1.0, 1.5, 0.0], [0.1, 0.7, 0.33, 0.0]])
    found = integers(weight[:1], Grid(3), 4, symmetric=True)
    assert found is not None and (found[1] * found[0]).tolist() == weight[:1].tolist()
    assert integers(weight, Grid(3), 4, symmetric=True) is None
    # 5 is no integer of three bits beside −3, but of four.
    assert integers(torch.tensor([[5.0, -3.0, 1.0]]), Grid(3), 3, symmetric=False) is None
    assert integers(torch.tensor([[5.0, -3.0, 1.0]]), Grid(4), 3, symmetric=True) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["int8", "int4,group=32", "int3,group=32,symmetric=false"])
def test_the_sweep_keeps_outputs_better_than_the_nearest(spec: str, dtype: torch.dtype) -> None:
    ratios = []
    for kind in slow.KINDS:
        weight, x = pruned_problem(kind)
        weight, h, stats = weight.to(dtype), slow.damped(x)[0], slow.statistics(x)
        swept, nearest = (
            slow.objective(parse_pass(f"round:{spec},compensation={how}").prune(weight, stats).weight, weight, h)
            for how in ("sweep", "none")
        )
        ratios.append(swept / nearest)
    assert sum(ratios) / len(ratios) < 0.7 and max(ratios) < 1.05, ratios


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_by_squared_error_lose_no_more_than_those_that_clip_nothing(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 64, generator=generator) ** 3
    weights = torch.rand(64, generator=generator)
    lost = {}
    for scale in ("mse", "minmax"):
        found = fit(values, Grid(4), torch.float32, symmetric=symmetric, scale=scale, weights=weights)  # type: ignore[arg-type]
        lost[scale] = ((found.rounded(values) - values).square() * weights).sum(1)
    assert (lost["mse"] <= lost["minmax"]).all() and float(lost["mse"].sum()) < 0.98 * float(lost["minmax"].sum())


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("round:int5", PatternError, "Write int8, int4 or int3"),
        ("round:intx", PatternError, "not a grid"),
        ("round", SpecError, "no grid after the name. Write round:int8"),
        ("round:2:4", SpecError, "--pass twin:2:4 --pass round:int4"),
        ("wanda:int4", SpecError, "--pass wanda:2:4 --pass round:int4"),
        ("permute:int4", SpecError, "no pattern of zeros"),
        ("round:int4,group=100", SpecError, "32 or 64 or 128 or row"),
        ("round:int4,compensation=none,percdamp=0.1", SpecError, "has no sweep"),
        ("round:int4,percdamp=-1", SpecError, "a share of the diagonal"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        parse_pass(text)
    assert says in str(caught.value)


def test_matrices_that_cannot_be_rounded_are_refused() -> None:
    check_pass("round:int4,group=32")
    with pytest.raises(SpecError, match="do not tell 256 integers"):
        parse_pass("round:int8,symmetric=false,compensation=none").prune(torch.ones(2, 4).bfloat16(), None)
    with pytest.raises(CalibrationError, match="float16 ends at 65504"):
        parse_pass("round:int3,compensation=none").prune(torch.full((2, 4), 1e9), None)


@pytest.mark.parametrize("later", ["wanda:2:4", "refine", "magnitude:50%"])
def test_nothing_that_moves_or_prunes_weights_follows(later: str) -> None:
    with pytest.raises(SpecError, match="after round: weights that are rounded or packed by then"):
        sparsify.compile(nn.Linear(8, 8), ["round:int4,compensation=none", later], calibration=[torch.randn(4, 8)])


def test_values_off_the_grid_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Round, "nearest", lambda self, weight: weight.float())
    with pytest.raises(VerifyError, match="values off a grid of int3"):
        sparsify.compile(nn.Linear(64, 8), ["round:int3,compensation=none"], calibration=[torch.randn(4, 64)])


def text_of(report: Any) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report)
    return console.export_text()


def test_a_pruned_model_is_rounded_into_a_folder(tmp_path: Path) -> None:
    """After a prune: its zeros are promised and held, the rest lies on the grid, and nothing says that it pruned."""
    model = build("llama").bfloat16()
    specs = ["twin:2:4", "round:int4,group=32"]
    made = sparsify.compile(model, specs, calibration=[inputs("llama", rows=4)], output=tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "sparsify.json").read_text())
    pruned, rounded = manifest["passes"]
    assert rounded["sites"] == [] and {s["pattern"] for s in rounded["rounded"]} == {"int4"}
    assert [s["name"] for s in rounded["rounded"]] == [s["name"] for s in pruned["sites"]]
    assert "rounded" in manifest["history"][0]["passes"][1] and "pruned" not in manifest["history"][0]["passes"][1]
    for target in made.runs[1].targets:
        weight = made.weight(target.parameter)
        assert weight.dtype == torch.bfloat16
        assert int((weight != 0).unflatten(1, (-1, 4)).sum(-1).max()) <= 2
        assert integers(weight, Grid(4), 32, symmetric=True) is not None
    report = text_of(result_report(made, 1.0))
    assert "round:int4,group=32, schedule layer" in report and "whole model" in report
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{len(rounded['rounded'])} rounded" in card and "pruned" in card


def test_a_dense_model_is_rounded_without_data(tmp_path: Path) -> None:
    model = build("llama")
    made = sparsify.compile(model, ["round:int8,compensation=none"], output=tmp_path / "out")
    assert made.calibration is None and "zero" not in made.summary().splitlines()[0]
    for target in made.runs[0].targets:
        before, after = model.get_parameter(target.parameter), made.weight(target.parameter)
        assert float((after - before).detach().norm() / before.detach().norm()) < 0.02
        assert not torch.equal(after, before) and made.runs[0].rounds
    card = (tmp_path / "out" / "README.md").read_text()
    assert "int8" in card and "pruned" not in card.split("---")[1]
    plan = text_of(plan_report(sparsify.compile(model, ["round:int8,compensation=none"], dry_run=True)))
    assert "would round" in plan and "zeros" not in plan


@pytest.mark.parametrize(
    ("family", "named", "parameter"),
    [
        ("llama", "model.embed_tokens", "model.embed_tokens.weight"),
        ("gpt2", "transformer.wte", "transformer.wte.weight"),
        ("gpt2", "lm_head", "transformer.wte.weight"),
    ],
)
def test_an_embedding_by_name(family: str, named: str, parameter: str, tmp_path: Path) -> None:
    """Alone, or with the head that it is: each row to its nearest values, first of all, into an ordinary folder."""
    model, batches = build(family), [inputs(family, rows=2)]
    # The linear layers of a pass with a name of its own come after it.
    specs: list[Any] = [{"pass": "round:int4,group=32", "only": [named]}, "round:int8"]
    made = sparsify.compile(model, specs, calibration=batches, output=tmp_path / "out")
    (site,) = made.runs[0].sites
    assert site.parameter == parameter and site.error is None and "an embedding" in site.notes[0]
    assert ("head" in site.notes[0]) == (family == "gpt2")
    before, after = model.get_parameter(parameter), made.weight(parameter)
    nearest = parse_pass("round:int4,group=32,compensation=none").prune(before.detach(), statistics=None)
    assert torch.equal(after, nearest.weight) and not torch.equal(after, before)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_input_embeddings().weight, after)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (family == "gpt2")
    # What follows was measured with it: as if the model had come with it.
    again = sparsify.compile(tmp_path / "out", [], output=tmp_path / "same", to="packed:choice=smallest")
    assert any("embedding" in note and "rows are looked up" in note for note in again.notes)
    assert torch.equal(again.weight(parameter), after)


def test_embeddings_stay_where_nobody_names_them_and_are_never_pruned() -> None:
    model = build("gpt2")
    plain = sparsify.compile(model, ["round:int8,compensation=none"])
    assert all("wte" not in site.parameter and "wpe" not in site.parameter for site in plain.runs[0].sites)
    every = sparsify.compile(model, ["round:int8,compensation=none"], only=["*"], ignore=["transformer.wpe"])
    names = {site.parameter for site in every.runs[0].sites}
    assert "transformer.wte.weight" in names and "transformer.wpe.weight" not in names
    with pytest.raises(SpecError, match="shared with the embedding"):
        sparsify.compile(model, ["magnitude:2:4"], only=["lm_head"])
    with pytest.raises(SpecError, match="nothing to prune"):
        sparsify.compile(build("llama"), ["magnitude:2:4"], only=["model.embed_tokens"])


def test_a_head_by_name_and_experts_without_tokens() -> None:
    made = sparsify.compile(build("mixtral"), ["round:int4"], calibration=[inputs("mixtral", rows=1)], only=["*"])
    names = {site.name for site in made.runs[0].sites}
    assert "lm_head" in names and any("experts" in name for name in names)
    for target in made.runs[0].targets:
        for matrix in target.site.matrices(made.weight(target.parameter)):
            assert integers(matrix, Grid(4), matrix.shape[1], symmetric=True) is not None


@pytest.mark.parametrize("first", ["round:int8", "sparsegpt:2:4,bits=4"])
def test_weights_are_rounded_once(first: str, bundled: Path) -> None:
    """A second grid would move values off the first, which the first had made up for."""
    with pytest.raises(SpecError, match=rf"round:int4 after {first}.*lie on a grid already.*`only` of its own"):
        sparsify.compile(bundled, [first, "round:int4"], dry_run=True)
    own = [{"pass": first, "only": ["*.mlp.*"]}, {"pass": "round:int4", "only": ["*.self_attn.*"]}]
    sparsify.compile(bundled, own, dry_run=True)
