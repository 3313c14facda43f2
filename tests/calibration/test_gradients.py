"""Gradient statistics against autograd on the eager model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.families import FAMILIES, build, inputs
from torch import Tensor, nn

import sparsify
from sparsify.analysis.linear import find_sites
from sparsify.calibration.gradients import Samples, measure_gradients
from sparsify.calibration.sums import Gradients
from sparsify.context import Context
from sparsify.data.batches import load_calibration
from sparsify.errors import CalibrationError, TraceError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.method.pattern import Unstructured
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose

ALL = frozenset({"gradient", "gradient_l1", "gradient_l2", "gradient_platon"})
# Models whose loss needs no labels.
LOSSES = [family for family in FAMILIES if family not in ("bert",)]


def ours(model: Any, batches: Any, memory: int = 1 << 30) -> dict[str, dict[str, Tensor]]:
    source = open_source(model)
    data = load_calibration(batches, source, rows=1)
    program = capture(source, data.batches[0])
    targets, _ = choose(program, Unstructured("0.5"), Wanted())
    found = {}
    with Gradients(memory) as store:
        names, samples = [target.parameter for target in targets], Samples(data.batches, data.labels)
        measure_gradients(program, names, samples, ALL, store, Context(memory=memory))
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


@pytest.mark.first(5)
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


@pytest.mark.parametrize("memory", [1 << 30, 1000])
def test_a_weight_that_two_blocks_share_has_the_gradients_of_both(memory: int) -> None:
    """Each block is differentiated for itself: a sample's gradient is the sum of theirs, whatever is made of it."""
    model = build("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    batch = inputs("llama", rows=3)
    found = ours(model, [batch], memory)
    name = "model.layers.0.mlp.up_proj.weight"
    single = [{n: t[i : i + 1] for n, t in batch.items()} for i in range(3)]
    for statistic, value in eager(model, single, [name])[name].items():
        torch.testing.assert_close(found[name][statistic], value, rtol=2e-3, atol=2e-4 * float(value.abs().max()))


@pytest.mark.parametrize("wanted", [ALL, {"gradient"}])
def test_embeddings_tied_to_the_head(wanted: set[str]) -> None:
    """The first region and the last read one weight."""
    model = build("opt")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    batch, name = inputs("opt", rows=3), "model.decoder.embed_tokens.weight"
    source = open_source(model)
    data = load_calibration([batch], source, rows=1)
    program = capture(source, data.batches[0])
    site = next(site for site in find_sites(program)[0] if site.parameter == name)
    with Gradients(1 << 30) as store:
        measure_gradients(program, [name], Samples(data.batches), wanted, store, Context())
        found = {n: site.layout(v, model.get_parameter(name)) for n, v in store.read(site).items()}
    assert found.keys() == wanted
    expected = eager(model, [{n: t[i : i + 1] for n, t in batch.items()} for i in range(3)], [name])[name]
    for statistic, value in found.items():
        exact = expected[statistic]
        torch.testing.assert_close(value, exact, rtol=2e-3, atol=2e-4 * float(exact.abs().max()))


def test_gradients_of_a_float16_model_are_those_of_its_loss() -> None:
    """The loss is multiplied on the way back, or small ones would vanish; what is kept is not."""
    model = build("llama").half()
    batch = inputs("llama", rows=2)
    found = ours(model, [batch])
    single = [{n: t[i : i + 1] for n, t in batch.items()} for i in range(2)]
    expected = eager(model.float(), single, list(found))
    for name, values in expected.items():
        for statistic in ("gradient", "gradient_l1", "gradient_l2"):
            lost = (found[name][statistic].float() - values[statistic]).norm() / values[statistic].norm()
            assert float(lost) < 0.02, (name, statistic)


def test_gradients_that_say_nothing_are_refused() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.\w+_proj\.weight.*zero on every calibration sample"):
        ours(model, [inputs("llama", rows=2)])
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(64, 32).clamp(-3, 3) * 1e38)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        ours(model, [inputs("llama", rows=2)])
