"""Allocations: the total to the weight, OWL by its formula, the error-driven one against enumeration."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import build, inputs

import sparsify
from sparsify.errors import PatternError, SparsifyError, SpecError
from sparsify.method.pattern import Unstructured
from sparsify.method.selection import Comparison, select
from sparsify.method.spec import parse_pass
from sparsify.prune.allocation import _Budget, _hull, _meet
from sparsify.prune.fx_pass import GraphPrune


def zeros(result: sparsify.Compiled) -> tuple[int, int]:
    weights = [result.weight(t.parameter) for t in result.runs[0].targets]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


@pytest.mark.first(6)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize(
    "spec",
    [
        "wanda:53%,allocation=owl",
        "wanda:61.7%,allocation=error",
        "sparsegpt:53%,allocation=error",
        "magnitude:53%,allocation=owl",
        "wanda:53%,allocation=error,group=input,blocksize=8",
        "alps:47%,allocation=owl",
    ],
)
def test_the_total_is_met_exactly(family: str, spec: str) -> None:
    result = sparsify.compile(build(family), [spec], calibration=[inputs(family, rows=8)])
    pruned, total = zeros(result)
    pattern = result.runs[0].pattern
    assert isinstance(pattern, Unstructured)
    # Experts of one stack get one share each: their floors may lose a weight per expert.
    slack = sum(t.site.experts - 1 for t in result.runs[0].targets)
    assert int(pattern.sparsity * total) - slack <= pruned <= int(pattern.sparsity * total)
    shares = [site.kept for site in result.runs[0].sites]
    assert max(shares) - min(shares) > 0.005
    spread = 0.08 if "owl" in spec else 0.1
    assert all(abs(1 - kept - float(pattern.sparsity)) <= spread + 0.01 for kept in shares)


def test_owl_by_its_formula() -> None:
    """D per block, scaled to a range of 2λ and shifted to the mean, on inputs of an eager forward."""
    model, batch = build("llama"), inputs("llama", rows=8)
    with torch.no_grad():
        # Outliers in one block only.
        model.model.layers[1].mlp.down_proj.weight[::7, ::9] *= 20
    caught: dict[str, torch.Tensor] = {}
    names = {m: n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}
    hooks = [m.register_forward_pre_hook(lambda m, a: caught.__setitem__(names[m], a[0].flatten(0, 1))) for m in names]
    with torch.no_grad():
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    share = []
    for block in range(2):
        scores = [m.weight.abs() * caught[n].norm(dim=0) for m, n in names.items() if f"layers.{block}." in n]
        flat = torch.cat([s.flatten() for s in scores])
        share.append(float((flat > 3 * flat.mean()).float().mean()))
    scaled = [(s - min(share)) / (max(share) - min(share)) * 0.2 for s in share]
    expected = [0.5 - (s - sum(scaled) / 2) for s in scaled]
    result = sparsify.compile(model, ["wanda:50%,allocation=owl,spread=0.1,outliers=3"], calibration=[batch])
    for site in result.runs[0].sites:
        assert 1 - site.kept == pytest.approx(expected[int(site.name.split(".")[2])], abs=2e-3)


@pytest.mark.parametrize("outliers", [(1, 5, 2), (0, 4, 1), (7, 3, 30), (2, 2, 2)])
def test_owl_of_layers_with_so_many_outliers(outliers: tuple[int, int, int]) -> None:
    """Also many times as many in one layer as in another, none, and as many in all."""

    class Beside(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList([torch.nn.Linear(32, 32, bias=False) for _ in outliers])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([part(x) for part in self.parts], dim=-1)

    net = Beside()
    for part, count in zip(net.parts, outliers, strict=True):
        part.weight.data = 1 + 0.01 * torch.rand(32, 32)
        part.weight.data.view(-1)[:count] = 100
    span = (max(outliers) - min(outliers)) or 1
    scaled = [0.2 * (count - min(outliers)) / span for count in outliers]
    expected = [0.5 - s + sum(scaled) / 3 for s in scaled]
    found = sparsify.compile(net, ["wanda:50%,allocation=owl,spread=0.1,outliers=3"], calibration=[torch.eye(32)])
    shares = [float((found.weight(f"parts.{i}.weight") == 0).float().mean()) for i in range(3)]
    # Each output neuron floors its own count of 32.
    assert shares == pytest.approx(expected, abs=1 / 32)


def test_error_puts_zeros_where_they_cost_least() -> None:
    """A chain whose second layer reads dead inputs mostly: its weights go first, up to the bound."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    with torch.no_grad():
        net[0].weight[8:] *= 1e-3
        net[0].bias[8:] *= 1e-3
    x = torch.randn(256, 32)
    result = sparsify.compile(net, ["wanda:50%,allocation=error,spread=0.2"], calibration=[x])
    shares = {site.name: 1 - site.kept for site in result.runs[0].sites}
    assert shares["1"] == pytest.approx(0.7, abs=0.01) and shares["0"] == pytest.approx(0.3, abs=0.01)


def test_what_cannot_be_met_is_refused() -> None:
    model, batch = build("llama"), inputs("llama", rows=8)
    with pytest.raises(SparsifyError, match="spread"):
        sparsify.compile(model, ["wanda:99.99%,allocation=error"], calibration=[batch])
    with pytest.raises(PatternError, match=r"40\.0% to 60\.0%"):
        _meet({"a": Fraction(1, 2)}, _Budget({"a": 10}, 9, Fraction(2, 5), Fraction(3, 5)))
    with pytest.raises(SparsifyError, match="allocation"):
        sparsify.compile(model, ["magnitude:2:4,allocation=owl"], calibration=[batch])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.fractions(0, 1)), min_size=1, max_size=6),
    st.fractions(0, 1),
)
def test_meeting_a_total(sites: list[tuple[int, Fraction]], share: Fraction) -> None:
    sizes = {str(i): size for i, (size, _) in enumerate(sites)}
    wished = {str(i): wish for i, (_, wish) in enumerate(sites)}
    total = int(share * sum(sizes.values()))
    found = _meet(wished, _Budget(sizes, total, Fraction(0), Fraction(1)))
    assert sum(found.values()) == total and all(0 <= found[n] <= sizes[n] for n in sizes)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=9))
def test_the_hull_is_convex_and_below(errors: list[int]) -> None:
    points = list(range(len(errors)))
    hull = _hull(points, errors)
    assert hull[0] == 0 and hull[-1] == points[-1]
    slopes = [(errors[b] - errors[a]) / (b - a) for a, b in itertools.pairwise(hull)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(slopes))
    for a, b in itertools.pairwise(hull):
        for i in range(a, b):
            assert errors[i] >= errors[a] + (errors[b] - errors[a]) * (i - a) / (b - a) - 1e-9


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.fractions(0, 1),
    st.sampled_from(["output", "input", "layer"]),
    st.integers(1, 9),
)
def test_count_total_is_exact_and_even(rows: int, columns: int, share: Fraction, axis: str, blocksize: int) -> None:
    if not 0 < share < 1:
        return
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows * 100 + columns))
    size = 1 if axis == "layer" else blocksize
    mask = select(scores, Unstructured(share), Comparison(axis, size, "total"))  # type: ignore[arg-type]
    assert int(mask.sum()) == int(share * rows * columns)
    if axis == "output" and blocksize == 1:
        counts = mask.sum(dim=1)
        assert int(counts.max() - counts.min()) <= 1
        for row, gone in zip(scores, mask, strict=True):
            assert not gone.any() or gone.all() or row[gone].max() <= row[~gone].min()


def test_an_allocation_in_a_pass_manager_is_not_dropped() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    with torch.no_grad():
        net[0].weight[8:] *= 1e-3
        net[0].bias[8:] *= 1e-3
    bound = GraphPrune(parse_pass("magnitude:50%,allocation=error,spread=0.2"), [torch.randn(256, 32)])
    done = bound(torch.fx.symbolic_trace(net))
    assert done is not None
    shares = [float((p == 0).float().mean()) for n, p in done.graph_module.named_parameters() if "weight" in n]
    assert shares == pytest.approx([0.3, 0.7], abs=0.01)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("wanda:2:4,allocation=owl", "fixes the zeros"),
        ("wanda:50%,spread=0.1", "allocation=uniform"),
        ("wanda:50%,allocation=error,outliers=3", "allocation=owl"),
        ("wanda:50%,allocation=owl,count=exact", "fixes all counts"),
    ],
)
def test_contradictory_options_are_refused(spec: str, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        parse_pass(spec)
