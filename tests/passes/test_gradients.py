"""Gradient statistics against autograd on the eager model, and the passes that read them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, inputs
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import slow

import sparsify
from sparsify.analysis.linear import find_sites
from sparsify.calibration.gradients import Gradients, measure_gradients
from sparsify.data.batches import load_calibration
from sparsify.errors import CalibrationError, SparsifyError, TraceError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.method.pattern import NM, Unstructured
from sparsify.method.spec import parse_pass
from sparsify.passes import GBLM, Activation, Gradient
from sparsify.prune.targets import choose

ALL = frozenset({"gradient", "gradient_l1", "gradient_l2", "gradient_platon"})
# Models whose loss needs no labels.
LOSSES = [family for family in FAMILIES if family not in ("bert",)]


def ours(model: Any, batches: Any, memory: int = 1 << 30) -> dict[str, dict[str, Tensor]]:
    source = open_source(model)
    data = load_calibration(batches, source, one_by_one=True)
    program = capture(source, data.batches[0])
    targets, _ = choose(program, find_sites(program)[0], Unstructured("0.5"))
    found = {}
    with Gradients(memory) as store:
        measure_gradients(
            program, targets, data.batches, data.labels, ALL, store, memory, torch.device("cpu"), lambda p: None
        )
        for target in targets:
            values = store.read(target.site)
            found[target.parameter] = {
                n: target.site.layout(v, model.get_parameter(target.parameter)) for n, v in values.items()
            }
    return found


def eager(model: Any, batches: list[dict[str, Tensor]], names: list[str]) -> dict[str, dict[str, Tensor]]:
    """One whole forward and backward per sample, as the official code."""
    model = copy.deepcopy(model)
    sums: dict[str, dict[str, Tensor]] = {}
    smooth: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        model.zero_grad()
        more = {} if getattr(model.config, "use_cache", None) is None else {"use_cache": False}
        logits = model(**batch, **more).logits
        if logits.dim() == 2:
            loss = nn.functional.cross_entropy(logits, logits.argmax(dim=1))
        else:
            following = batch.get("decoder_input_ids", batch["input_ids"])[:, 1:]
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten())
        loss.backward()
        for name in names:
            g = model.get_parameter(name).grad
            into = sums.setdefault(name, {n: torch.zeros_like(g) for n in ("gradient", "gradient_l1", "gradient_l2")})
            into["gradient"] += g
            into["gradient_l1"] += g.abs()
            into["gradient_l2"] += g**2
            mean, deviation = smooth.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            mean = 0.85 * mean + 0.15 * g.abs()
            deviation = 0.95 * deviation + 0.05 * (g.abs() - mean).abs()
            smooth[name] = mean, deviation
    for name, into in sums.items():
        into["gradient_l2"] = into["gradient_l2"].sqrt()
        into["gradient_platon"] = smooth[name][0] * smooth[name][1]
    return sums


@pytest.mark.slow
@pytest.mark.parametrize("family", LOSSES)
def test_gradients_equal_autograd_on_the_whole_model(family: str) -> None:
    model = build(family)
    batch = inputs(family, rows=3)
    found = ours(model, [batch])
    single = [{n: t[i : i + 1] for n, t in batch.items()} for i in range(3)]
    expected = eager(model, single, list(found))
    assert found
    for name, values in expected.items():
        for statistic, value in values.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(
                found[name][statistic], value, rtol=2e-3, atol=2e-4 * scale, msg=f"{name} {statistic}"
            )


def test_a_small_budget_spills_and_changes_nothing() -> None:
    model, batch = build("llama"), inputs("llama", rows=3)
    one, other = ours(model, [batch]), ours(model, [batch], memory=1000)
    for name, values in one.items():
        for statistic, value in values.items():
            assert torch.equal(value, other[name][statistic])


def test_padding_does_not_count() -> None:
    model = build("llama")
    ids = inputs("llama", rows=2)["input_ids"]
    padded = torch.cat([ids, torch.full((2, 4), 3)], dim=1)
    mask = torch.cat([torch.ones(2, 16), torch.zeros(2, 4)], dim=1).long()
    plain = ours(model, [{"input_ids": ids}])
    held = ours(model, [{"input_ids": padded, "attention_mask": mask}])
    for name, values in plain.items():
        torch.testing.assert_close(held[name]["gradient"], values["gradient"], rtol=1e-3, atol=1e-5)


def test_labels_are_used() -> None:
    model, pixels = build("vit"), inputs("vit", rows=4)["pixel_values"]
    one = ours(model, [{"pixel_values": pixels, "labels": torch.tensor([0, 1, 0, 1])}])
    other = ours(model, [{"pixel_values": pixels, "labels": torch.tensor([1, 0, 1, 0])}])
    name = next(iter(one))
    assert not torch.allclose(one[name]["gradient"], other[name]["gradient"])
    # A masked language model has a loss once it is given labels.
    bert, batch = build("bert"), inputs("bert", rows=2)
    assert ours(bert, [batch | {"labels": batch["input_ids"]}])
    with pytest.raises(CalibrationError, match="one label for each prediction"):
        ours(bert, [batch | {"labels": batch["input_ids"][:, :3]}])


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(TraceError, match="needs labels"):
        sparsify.compile(build("bert"), ["gblm:50%"], calibration=[inputs("bert")])
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(TraceError, match="no logits"):
        sparsify.compile(net, ["gradient:50%"], calibration=[torch.randn(4, 8)])


def test_gblm_scores_are_the_papers() -> None:
    weight, x = slow.problem("random")
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(8, *weight.shape, generator=generator) * 1e-3
    values = {"gradient_l2": gradients.square().sum(dim=0).sqrt(), "gradient_l1": gradients.abs().sum(dim=0)}
    stats = slow.statistics(x, **values)
    norms = stats.squared_norm.sqrt()
    for norm in ("l1", "l2"):
        for reduction in ("sum", "mean"):
            g = values[f"gradient_{norm}"]
            if reduction == "mean":
                g = g / 8 if norm == "l1" else g / 8**0.5
            scores = weight.abs().double() * (norms + 100 * g.double())
            order = scores.sort(dim=1, stable=True).indices
            expected = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order[:, : weight.shape[1] // 2], True)
            ours = GBLM(Unstructured("0.5"), norm=norm, reduction=reduction).prune(weight, stats)  # type: ignore[arg-type]
            assert float((ours.mask == expected).double().mean()) >= 0.999
    # The gradient's share decides: without it the mask is Wanda's.
    tiny = GBLM(NM(2, 4), alpha=1e-12).prune(weight, stats)
    assert torch.equal(tiny.mask, parse_pass("wanda:2:4").prune(weight, stats).mask)
    assert not torch.equal(GBLM(NM(2, 4), alpha=1e6).prune(weight, stats).mask, tiny.mask)


@pytest.mark.parametrize("metric", ["snip", "movement", "platon", "l1", "l2"])
def test_gradient_metrics(metric: Any) -> None:
    weight, x = slow.problem("random")
    generator = torch.Generator().manual_seed(2)
    g = torch.randn(weight.shape, generator=generator)
    stats = slow.statistics(x, gradient=g, gradient_platon=g.abs(), gradient_l1=g.abs(), gradient_l2=g.abs())
    scores = {
        "snip": (weight * g).abs(), "movement": -weight * g, "platon": weight**2 * g.abs(), "l1": (weight * g).abs(),
        "l2": (weight * g).abs(),
    }[metric]  # fmt: skip
    pruned = Gradient(Unstructured("0.5"), metric=metric).prune(weight, stats)
    assert scores[pruned.mask].max() <= scores[~pruned.mask].min()
    assert int(pruned.mask.sum()) == weight.numel() // 2


def test_activation_pruning_removes_whole_neurons_and_their_bias() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4))
    x = torch.randn(256, 16)
    with torch.no_grad():
        net[0].weight[3] = net[0].weight[7] * 2  # redundant
        net[0].bias[3] = 5
        y = net[0](x).double()
    expected = {
        "mean": y.abs().mean(dim=0), "square": y.square().mean(dim=0), "std": y.std(dim=0, correction=0),
        "correlation": 1 - (torch.corrcoef(y.T) - torch.eye(12)).abs().amax(dim=1),
    }  # fmt: skip
    for metric, scores in expected.items():
        made = sparsify.compile(net, [f"activation:25%,metric={metric}"], calibration=[x], only=["0"]).model
        gone = scores.argsort()[:3]
        assert set((made[0].weight == 0).all(dim=1).nonzero().flatten().tolist()) == set(gone.tolist()), metric
        assert not made[0].bias[gone].any() and int((made[0].bias != 0).sum()) == 9
        assert torch.equal(made[1].weight, net[1].weight)
    assert Activation(Unstructured("0.5")).statistics == ("squared_norm", "output_absolute")


def test_the_pruned_bias_is_felt_by_what_follows() -> None:
    """The next site is measured behind the neuron that went."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(64, 8)
    made = sparsify.compile(net, ["activation:50%,metric=mean"], calibration=[x]).model
    with torch.no_grad():
        second = made[0](x) @ net[1].weight.T + net[1].bias
    gone = second.abs().mean(dim=0).argsort()[:4]
    assert set((made[1].weight == 0).all(dim=1).nonzero().flatten().tolist()) == set(gone.tolist())


def test_gradients_of_a_bare_graph_are_refused() -> None:
    net = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(SparsifyError, match="no logits"):
        GBLM(NM(2, 4)).bind([torch.randn(4, 8)])(net)
