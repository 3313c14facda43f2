"""Which channels may change places: heads and experts each for themselves, and what an operator tells apart not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import build, inputs
from torch import Tensor, nn

from sparsify.analysis.dimensions.lanes import Lanes, find_lanes
from sparsify.errors import Refused
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program


def captured(model: Any, batch: Any) -> Program:
    return capture(open_source(model), batch)


def found(model: Any, batch: Any, unit: int = 4) -> dict[str, Lanes | Refused]:
    return {
        lanes.name if isinstance(lanes, Lanes) else lanes.node: lanes
        for _, lanes in find_lanes(captured(model, batch), unit)
    }


def lanes_of(family: str, name: str) -> Lanes:
    (lanes,) = [one for at, one in found(build(family), inputs(family)).items() if at.endswith(name)]
    assert isinstance(lanes, Lanes)
    return lanes


class Values(nn.Module):
    """Attention's values without its scores: ``between`` happens to [batch, heads, width]."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.v, self.o, self.between = nn.Linear(8, 32), nn.Linear(32, 8), between

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.between(self.v(x).view(-1, 4, 8)).reshape(-1, 32))


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(8.0)


class Sliced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :4] * 2, x[..., 4:]], -1)


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


class Talking(nn.Module):
    """Heads are mixed, as in talking-heads attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


BATCH = {"x": torch.randn(3, 8, generator=torch.Generator().manual_seed(0))}


def test_a_head_that_two_queries_read_is_one_lane() -> None:
    lanes = lanes_of("llama", "0.self_attn.o_proj")
    assert [lane.channels for lane in lanes.lanes] == [8, 8] and not lanes.stacked
    moving = {m.parameter.rpartition("self_attn.")[2]: m for m in lanes.lanes[1].moving}
    assert moving["v_proj.weight"].places.tolist() == [[8 + c] for c in range(8)]
    assert moving["o_proj.weight"].places.tolist() == [[16 + c, 24 + c] for c in range(8)]
    assert [run.tolist() for run in lanes.lanes[1].reading[0].runs] == [list(range(16, 24)), list(range(24, 32))]


@pytest.mark.parametrize(("family", "places"), [("phi3", [3, 67]), ("gpt_oss", [6, 7])])
def test_gates_and_what_they_open_move_together(family: str, places: list[int]) -> None:
    """One behind the other, or in turns."""
    name = "0.mlp.down_proj" if family == "phi3" else "0.mlp.experts.down_proj"
    lanes = lanes_of(family, name)
    (made,) = [m for m in lanes.lanes[0].moving if m.parameter.endswith(("gate_up_proj", "gate_up_proj.weight"))]
    assert made.places[3].tolist() == places


def test_every_expert_has_an_order_of_its_own() -> None:
    lanes = lanes_of("gpt_oss", "0.mlp.experts.down_proj")
    assert [lane.expert for lane in lanes.lanes] == [0, 1, 2, 3]
    assert set(lanes.stacked.values()) == {0} and len(lanes.stacked) == 3


def test_values_inside_of_q_and_k_in_one_matrix_are_told_from_those() -> None:
    lanes = lanes_of("gpt_neox", "0.attention.dense")
    (made,) = [m for m in lanes.lanes[1].moving if m.parameter.endswith("query_key_value.weight")]
    assert len(lanes.lanes) == 4 and made.places[:, 0].tolist() == list(range(24 + 16, 24 + 24))


@pytest.mark.parametrize(
    ("between", "lanes"),
    [(nn.Identity(), 4), (nn.ReLU(), 4), (Scale(4, 8), 1), (Scale(8), 1), (nn.LayerNorm(8), 1)],
)
def test_heads_move_alike_where_something_between_is_theirs_together(between: nn.Module, lanes: int) -> None:
    one = found(Values(between), BATCH)["o"]
    assert isinstance(one, Lanes) and len(one.lanes) == lanes
    assert {"v.weight", "v.bias", "o.weight"} <= set(one.parameters)
    assert len(one.parameters) == 3 + len(list(between.parameters()))


@pytest.mark.parametrize("between", [Fixed(), Sliced(), Summed(), Talking()])
def test_what_an_operator_tells_apart_stays(between: nn.Module) -> None:
    one = found(Values(between), BATCH)["o"]
    assert isinstance(one, Refused) and one.reason


def test_fewer_than_two_groups_are_no_lane() -> None:
    assert isinstance(found(Values(nn.Identity()), BATCH, unit=8)["o"], Refused)
    assert isinstance(found(Values(nn.Identity()), BATCH, unit=16)["o"], Refused)
