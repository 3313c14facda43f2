"""ALPS: its masks lose less than those of the other methods."""

from __future__ import annotations

import pytest
from support import slow

from sparsify.method.spec import parse_pass


@pytest.mark.parametrize("pattern", ["2:4", "50%", "70%"])
@pytest.mark.parametrize("kind", ["random", "ill-conditioned", "outliers"])
def test_alps_finds_better_masks(kind: str, pattern: str) -> None:
    weight, inputs = slow.problem(kind, columns=192)
    h, dead = slow.damped(inputs)
    goal = weight.double().masked_fill(dead, 0)
    found = {
        spec: slow.objective(parse_pass(spec).prune(weight, slow.statistics(inputs)).weight, goal, h)
        for spec in (f"alps:{pattern}", f"apt:{pattern},mask=wanda", f"sparsegpt:{pattern},compensation=exact")
    }
    assert min(found, key=found.__getitem__) == f"alps:{pattern}", found
