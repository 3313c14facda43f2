"""A graph with channels taken out: what the dense one gives with those channels at zero, in every family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import FAMILIES, inputs
from support.zeroed import Net, Reports, check_equality, program_of, run
from torch import Tensor, nn

from sparsify.analysis.dimensions.groups import coupled_dimensions
from sparsify.errors import SpecError, TraceError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.structure.shrink import _CORRECTIONS, CutStore, kept_positions, shrink

QUICK = ("llama", "gpt2", "falcon")


def test_what_cannot_be_removed_is_refused() -> None:
    program, dimensions = program_of(Net(lambda x, n: x, 8, 8), {"0": torch.randn(2, 3, 6)})
    number = next(i for i, g in enumerate(dimensions.groups) if g.channels == 8)
    last = next(i for i, g in enumerate(dimensions.groups) if g.pinned.all())
    for remove, match in (
        ({number: range(8)}, "nothing would be left"),
        ({number: [8]}, "8 channels"),
        ({99: [0]}, "groups"),
        ({last: [0]}, "returns it|no parameter"),
    ):
        with pytest.raises(SpecError, match=match):
            shrink(program, dimensions, remove)  # type: ignore[arg-type]
    assert run(shrink(program, dimensions, {}), {"0": torch.ones(2, 3, 6)}).shape == (2, 3, 5)


@pytest.mark.first(5)
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in QUICK)]
)
def test_a_model_without_channels_is_the_model_with_zeros(name: str, report: Reports) -> None:
    program, found = report(name)
    dimensions, batch = found.dimensions, inputs(name)
    exact = [i for i, g in enumerate(dimensions.groups) if len(g.free) > 1 and not g.renormalized]

    @settings(max_examples=6, deadline=None)
    @given(st.data())
    def drawn(data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(exact), min_size=1, unique=True))
        remove = {}
        for i in chosen:
            free = [int(c) for c in dimensions.groups[i].free]
            remove[i] = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=len(free) - 1, unique=True))
        check_equality(program, dimensions, remove, batch)

    drawn()


class Picked(nn.Module):
    """The last two of eight channels, by a list of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(2, 5)
        self.register_buffer("places", torch.tensor([7, -2]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[..., self.places])


def test_a_list_of_positions_is_corrected() -> None:
    program = capture(open_source(Picked()), {"0": torch.randn(2, 3, 6)})
    dimensions = coupled_dimensions(program)
    number = next(i for i, group in enumerate(dimensions.groups) if group.channels == 8)
    small = shrink(program, dimensions, {number: [0, 3]})
    (made,) = (value for name, value in small.constants.items() if name not in program.constants)
    assert made.tolist() == [5, 4]


class Chosen(nn.Module):
    """Some rows of what two layers make, chosen by their numbers: how many, only a run can say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        made = self.second(self.first(x).relu())
        return made[x.sum(-1) > 0]


def test_behind_what_stays_as_large_nothing_is_tried_again() -> None:
    batch = {"0": torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))}
    program, dimensions = program_of(Chosen(), batch)
    number = next(i for i, g in enumerate(dimensions.groups) if any(m.parameter == "first.weight" for m in g.members))
    check_equality(program, dimensions, {number: [0, 3]}, batch)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_the_residual_width_of_a_whole_model(name: str, report: Reports) -> None:
    """Norms divide by another width then, so that it is no model with zeros; but it runs, everywhere narrower."""
    program, found = report(name)
    number, group = next((i, g) for i, g in enumerate(found.dimensions.groups) if found.kind(g) == "width")
    assert group.renormalized
    small = shrink(program, found.dimensions, {number: [int(c) for c in group.free[:8]]})
    assert bool(run(small, inputs(name)).isfinite().all())
    for member in group.members:
        assert small.weights.read(member.parameter).shape[member.axis] == 24


def test_experts_need_as_many_as_a_token_takes(report: Reports) -> None:
    program, found = report("mixtral")
    number = next(i for i, g in enumerate(found.dimensions.groups) if found.kind(g) == "experts")
    small = shrink(program, found.dimensions, {number: [1]})
    assert bool(run(small, inputs("mixtral")).isfinite().all())
    with pytest.raises(TraceError, match="chooses 2 of 1"):
        shrink(program, found.dimensions, {number: [0, 1, 2]})


def test_every_other_channel_goes_with_its_neighbour_or_not_at_all() -> None:
    net = Net(lambda x, n: x[..., ::2], 8, 4)
    batch = {"0": torch.randn(2, 3, 6)}
    program, dimensions = program_of(net, batch)
    number = next(i for i, g in enumerate(dimensions.groups) if any(m.parameter == "first.weight" for m in g.members))
    member = next(m for m in dimensions.groups[number].members if m.parameter == "first.weight")
    one, two = (int(member.channel[at]) for at in (2, 3))
    with pytest.raises(TraceError, match="every 2th of channels that are not removed in 2s"):
        shrink(program, dimensions, {number: [one]})
    if two in dimensions.groups[number].free and two != one:
        check_equality(program, dimensions, {number: sorted((one, two))}, batch)


def test_a_rule_that_corrects_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    program, dimensions = program_of(
        Net(lambda x, n: x.view(2, 3, 4, 2).view(2, 3, 8), 8, 8), {"0": torch.randn(2, 3, 6)}
    )
    number = next(i for i, g in enumerate(dimensions.groups) if any(m.parameter == "first.weight" for m in g.members))
    monkeypatch.setitem(_CORRECTIONS, "view", lambda edit, node, copied, graph: None)
    channel = int(dimensions.groups[number].free[0])
    with pytest.raises(TraceError, match=r"it does not run any more.*Report this as a bug"):
        shrink(program, dimensions, {number: [channel]})


def test_a_cut_store_is_only_read() -> None:
    program, dimensions = program_of(Net(lambda x, n: x, 8, 8), {"0": torch.randn(2, 3, 6)})
    number = next(i for i, g in enumerate(dimensions.groups) if g.channels == 8)
    cut = CutStore(program.weights, kept_positions(dimensions, {number: [0]}))
    assert cut.shape("first.weight") == cut.read("first.weight").shape == (7, 6)
    with pytest.raises(SpecError, match="weights that are only read"):
        cut.write("first.weight", cut.read("first.weight"))
