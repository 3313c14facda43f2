"""SparseGPT against the official loop, column by column, on matrices and on whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import slow
from support.families import build
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sparsify
from sparsify.cli.tables import result_report
from sparsify.errors import CalibrationError, SpecError
from sparsify.method.grids.finding import integers
from sparsify.method.pattern import Grid
from sparsify.method.spec import parse_pass


@pytest.mark.parametrize("pattern", slow.PATTERNS)
@pytest.mark.parametrize("kind", slow.KINDS)
def test_sparsegpt_equals_the_column_loop(kind: str, pattern: str) -> None:
    weight, inputs = slow.problem(kind, columns=192)
    h, dead = slow.damped(inputs)
    pruned = parse_pass(f"sparsegpt:{pattern}").prune(weight, slow.statistics(inputs))
    reference, mask = slow.column_by_column(weight, h, dead, pattern, slow.obs_scores)
    goal = weight.double().masked_fill(dead, 0)
    slow.agree(pruned.weight, pruned.mask & ~dead, reference, mask & ~dead, goal, h)
    assert not pruned.weight[:, dead].any()


@pytest.mark.parametrize("blocksize", [32, 64, 200])
def test_sparsegpt_compares_within_its_blocksize(blocksize: int) -> None:
    weight, inputs = slow.problem("random", columns=192)
    h, dead = slow.damped(inputs)
    pruned = parse_pass(f"sparsegpt:50%,blocksize={blocksize}").prune(weight, slow.statistics(inputs))
    reference, mask = slow.column_by_column(weight, h, dead, "50%", slow.obs_scores, blocksize=blocksize)
    slow.agree(pruned.weight, pruned.mask, reference, mask, weight, h)


def by_rows(weight: Tensor, bits: int, symmetric: bool) -> Callable[[Tensor], Tensor]:
    """The official quantizer, for each output neuron by its dense weights; scales as float16."""
    least, most = weight.double().amin(1).clamp(max=0), weight.double().amax(1).clamp(min=0)
    span, half = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        low = torch.where(-least > most, -half, 1 - half).double()
        scale = torch.maximum(least / low, most / (low + span)).half().double()
    else:
        exact = (most - least) / span
        scale, low = exact.half().double(), -(-least / exact).round()

    def settle(column: Tensor) -> Tensor:
        return scale * torch.minimum(torch.maximum((column / scale).round(), low), low + span)

    return settle


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_the_joint_mode_equals_the_column_loop(pattern: str, bits: int, symmetric: bool) -> None:
    weight, inputs = slow.problem("random", columns=64)
    h, dead = slow.damped(inputs)
    own = parse_pass(f"sparsegpt:{pattern},bits={bits}" + ("" if symmetric else ",symmetric=false"))
    result = own.prune(weight, slow.statistics(inputs)).weight
    reference, _ = slow.column_by_column(
        weight, h, dead, pattern, slow.obs_scores, settle=by_rows(weight, bits, symmetric)
    )
    # In float32 a value between two integers may fall to the other side, and what is right of it follows.
    assert float(((result.double() - reference).abs() <= 1e-5 * weight.abs().amax()).double().mean()) >= 0.95
    assert slow.objective(result, weight, h) == pytest.approx(slow.objective(reference, weight, h), rel=0.05)
    assert integers(result, Grid(bits), 64, symmetric=symmetric) is not None
    assert own.broken(result) is None and own.broken(result + weight * 0.01) is not None


def test_what_is_rounded_jointly_is_not_moved_again(folder: Callable[[str], Path], ids: Tensor, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^refine after sparsegpt: .* rounded .*"):
        sparsify.compile(folder("llama"), ["sparsegpt:2:4,bits=4", "refine"], calibration=[ids])
    result = sparsify.compile(folder("llama"), ["sparsegpt:2:4,bits=4"], calibration=[ids], output=tmp_path / "out")
    left = result.program.weights.read("model.layers.0.mlp.down_proj.weight")
    assert integers(left, Grid(4), left.shape[1], symmetric=True) is not None
    assert result.manifest["passes"][0]["spec"] == "sparsegpt:2:4,bits=4"


def test_bfloat16_has_no_256_values_with_a_zero_point() -> None:
    weight, inputs = slow.problem("random", columns=64)
    with pytest.raises(SpecError, match="bits=8,symmetric=false: weights in bfloat16"):
        parse_pass("sparsegpt:2:4,bits=8,symmetric=false").prune(weight.bfloat16(), slow.statistics(inputs))


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


def test_a_gram_matrix_that_overflows_names_its_site() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(CalibrationError, match=r"the input of 0 of 0.*overflows"):
        sparsify.compile(net, ["sparsegpt:2:4"], calibration=[torch.randn(16, 8) * 1e25])


def test_raised_damping_reaches_the_report() -> None:
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


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("sparsegpt:50%,group=output", "blocks of columns"),
        ("sparsegpt:2:4,solver=cg", "compensation=exact"),
        ("sparsegpt:2:4,percdamp=-1", "share of the diagonal"),
        ("sparsegpt:2:4,bits=5", "8, 4 and 3"),
        ("sparsegpt:2:4,bits=16,symmetric=false", "nothing is rounded"),
        ("sparsegpt:2:4,bits=4,compensation=exact", "off their grid"),
        ("sparsegpt:2:4,bits=4,dead=keep", "off their grid"),
    ],
)
def test_contradictory_options_are_refused(spec: str, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        parse_pass(spec)
