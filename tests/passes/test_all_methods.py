"""Every method on every family that the core captures, end to end; and what all of them promise."""

from __future__ import annotations

import pytest
import torch
from support import slow
from support.families import FAMILIES, build, inputs

import sparsify
from sparsify.method.pattern import NM, parse_pattern
from sparsify.method.spec import parse_pass
from sparsify.passes import Twin, Wanda

METHODS = [
    "sparsegpt:2:4", "sparsegpt:50%,compensation=block", "apt:2:4", "apt:50%", "alps:2:4", "twin:2:4", "gblm:2:4",
    "gradient:50%,metric=platon", "wanda:2:4,update=iterative", "wanda:50%,update=sequential,target=dense",
    "magnitude:2:4,update=block", "wanda:60%,allocation=owl", "wanda:60%,allocation=error", "activation:25%",
]  # fmt: skip


@pytest.mark.first(2)
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_on_every_family(family: str) -> None:
    """One after the other on one graph; the last pattern still holds in the folder that is written."""
    model, batch = build(family), inputs(family, rows=6)
    labels = {"labels": batch["input_ids"]} if family == "bert" else {}
    result = sparsify.compile(model, [*METHODS, "sparsegpt:2:4"], calibration=[batch | labels])
    assert len(result.runs) == len(METHODS) + 1
    for run in result.runs:
        assert run.sites and all(0 < site.kept < 1 for site in run.sites), run.applied
        assert all(site.error is not None and site.error < 3 for site in run.sites), run.applied
    for target in result.runs[-1].targets:
        matrices = target.site.matrices(result.weight(target.parameter))
        assert int((matrices != 0).unflatten(-1, (-1, 4)).sum(-1).max()) <= 2
    more = {} if getattr(model.config, "use_cache", None) is None else {"use_cache": False}
    with torch.no_grad():
        assert result.model(**batch, **more).logits.isfinite().all()


def test_patterns_hold_after_every_method() -> None:
    weight, inputs = slow.problem("random", columns=64)
    stats = slow.statistics(inputs, inputs)
    for spec in ("sparsegpt", "apt", "alps", "twin", "wanda"):
        for text in ("3:4", "1:2", "2:8", "10:16"):
            pattern = parse_pattern(text)
            assert isinstance(pattern, NM)
            options = ",update=iterative" if spec == "wanda" else ",mask=S" if spec == "apt" and pattern.m > 8 else ""
            pruned = parse_pass(f"{spec}:{text}{options}").prune(weight, stats)
            groups = (pruned.weight != 0).view(-1, pattern.m).sum(dim=1)
            assert int(groups.max()) <= pattern.n, (spec, text)
    assert Wanda(NM(2, 4)).keeps_weights and not Wanda(NM(2, 4), update="exact").keeps_weights
    assert Twin(NM(2, 4)).statistics == ("squared_norm", "gram", "cross_gram", "dense_weight")
