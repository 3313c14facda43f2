"""Every method on every family that the core captures, end to end; and SparseGPT against hooks on an eager model."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, inputs
from rich.console import Console
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))
import slow

import sparsify
from sparsify.cli.tables import result_report
from sparsify.errors import CalibrationError

METHODS = [
    "sparsegpt:2:4", "sparsegpt:50%,compensation=block", "apt:2:4", "apt:50%", "alps:2:4", "twin:2:4", "gblm:2:4",
    "gradient:50%,metric=platon", "wanda:2:4,update=iterative", "wanda:50%,update=sequential,target=dense",
    "magnitude:2:4,update=block", "wanda:60%,allocation=owl", "wanda:60%,allocation=error", "activation:25%",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_on_every_family(family: str, tmp_path: Path) -> None:
    """One after the other on one graph; the last pattern still holds in the folder that is written."""
    model, batch = build(family), inputs(family, rows=6)
    labels = {"labels": batch["input_ids"]} if family == "bert" else {}
    result = sparsify.compile(model, [*METHODS, "sparsegpt:2:4"], calibration=[batch | labels])
    assert len(result.runs) == len(METHODS) + 1
    for run in result.runs:
        assert run.sites and all(0 < site.kept < 1 for site in run.sites), run.weight_pass
        assert all(site.error is not None and site.error < 3 for site in run.sites), run.weight_pass
    for target in result.runs[-1].targets:
        matrices = target.site.matrices(result.weight(target.parameter))
        assert int((matrices != 0).unflatten(-1, (-1, 4)).sum(-1).max()) <= 2
    more = {} if getattr(model.config, "use_cache", None) is None else {"use_cache": False}
    with torch.no_grad():
        assert result.model(**batch, **more).logits.isfinite().all()


def sparsegpt_with_hooks(model: Any, blocks: nn.ModuleList, ids: Tensor, pattern: str) -> dict[str, Tensor]:
    """The block procedure with the official loop, in float64, on an eager model in place."""
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for block in blocks:
        linears = [m for m in block.modules() if isinstance(m, (nn.Linear, Conv1D))]
        caught: dict[Any, list[Tensor]] = {m: [] for m in linears}
        hooks = [m.register_forward_pre_hook(lambda m, a: caught[m].append(a[0].flatten(0, -2))) for m in linears]  # noqa: B023
        model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for linear in linears:
            inputs = torch.cat(caught[linear]).double()
            h, dead = slow.damped(inputs, sequences=len(ids))
            turned = isinstance(linear, Conv1D)
            weight = linear.weight.data.T if turned else linear.weight.data
            new, _ = slow.column_by_column(weight, h, dead, pattern, slow.obs_scores)
            linear.weight.data = (new.T if turned else new).float().contiguous()
            found[f"{names[linear]}.weight"] = linear.weight.data
    return found


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sparsegpt_equals_the_block_procedure_with_hooks(family: str, pattern: str) -> None:
    model, ids = build(family), torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(5))
    result = sparsify.compile(model, [f"sparsegpt:{pattern}"], calibration=ids, schedule="block")
    plain = copy.deepcopy(model)
    with torch.no_grad():
        blocks = plain.model.layers if family == "llama" else plain.transformer.h
        expected = sparsegpt_with_hooks(plain, blocks, ids, pattern)
    assert {t.parameter for t in result.runs[0].targets} == expected.keys()
    for name, weight in expected.items():
        ours = result.weight(name)
        assert float(((ours == 0) == (weight == 0)).float().mean()) >= 0.999, name
        assert float((ours - weight).norm() / weight.norm()) < 1e-2, name


def test_the_recorded_gram_matrix_is_the_inputs_own() -> None:
    from sparsify.calibration.recorder import GroupRecorder

    for features in (3, 64, 65, 300):
        rows = torch.randn(40, features)
        dense = torch.randn(40, features)
        recorder = GroupRecorder(("gram", "cross_gram", "sum"), 2, features, torch.device("cpu"))
        recorder.update(rows[:20], torch.tensor([12, 20]), dense[:20])
        recorder.update(rows[20:], torch.tensor([0, 20]), dense[20:])
        for expert, index in ((0, slice(0, 12)), (1, slice(12, 40))):
            stats, x, y = recorder.statistics(expert, 4), rows[index].double(), dense[index].double()
            torch.testing.assert_close(stats.gram.double(), x.T @ x / 4, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(stats.values["cross_gram"].double(), y.T @ x / 4, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(stats.values["sum"], x.sum(dim=0) / 4, rtol=1e-5, atol=1e-5)


def test_a_gram_matrix_that_overflows_names_its_site() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(CalibrationError, match=r"Gram matrix of 0.*NaN or infinity"):
        sparsify.compile(net, ["sparsegpt:2:4"], calibration=[torch.randn(16, 8) * 1e25])


def test_raised_damping_reaches_the_report(tmp_path: Path) -> None:
    """Equal features and no damping: the site is named in the result, the manifest and the table."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(64, 1).expand(64, 8).contiguous()
    result = sparsify.compile(net, ["sparsegpt:2:4,percdamp=0"], calibration=[x])
    site = result.runs[0].sites[0]
    assert len(site.notes) == 1 and site.notes[0].startswith("damping raised from 0 to ")
    assert result.manifest["passes"][0]["sites"][0]["notes"] == site.notes
    console = Console(width=200, record=True)
    console.print(result_report(result, 1.0))
    assert site.notes[0] in console.export_text()
