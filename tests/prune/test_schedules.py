"""The engine's schedules against the plain procedure, and what each promises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from support.chain import Chain
from support.families import FAMILIES, build, inputs
from support.pruning import prune_captured
from support.reference import prune_blocks_with_hooks
from torch import Tensor, nn

import sparsify
from sparsify.context import Progress
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program


def pruned_weights(model: Any, batches: Any, spec: str = "wanda:2:4", **options: Any) -> dict[str, Tensor]:
    result = sparsify.compile(model, [spec], calibration=batches, **options)
    return {t.parameter: result.weight(t.parameter) for t in result.runs[0].targets}


@cache
def traced(family: str, *shape: int, masked: bool = False) -> tuple[nn.Module, Program]:
    """A family's model and its graph for token ids of a shape; neither is to be changed."""
    model, ids = build(family), torch.zeros(shape, dtype=torch.long)
    return model, capture(open_source(model), {"input_ids": ids} | ({"attention_mask": ids} if masked else {}))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%", "70%"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_block_masks_equal_the_papers_procedure_bit_for_bit(family: str, pattern: str) -> None:
    ids = torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(5))
    model, program = traced(family, 8, 24)
    ours, _ = prune_captured(program, f"wanda:{pattern}", [{"input_ids": ids}], schedule="block")
    plain: Any = copy.deepcopy(model)
    blocks = plain.model.layers if family == "llama" else plain.model.decoder.layers
    with torch.no_grad():
        masks = prune_blocks_with_hooks(plain, blocks, [{"input_ids": row[None]} for row in ids], pattern)
    assert ours.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(ours[name] == 0, mask), name
        assert torch.equal(ours[name], plain.get_parameter(name)), name


def by_hand(chain: Chain, x: Tensor, schedule: str) -> dict[str, Tensor]:
    """Each schedule in a few lines, from its definition."""
    measured, running = copy.deepcopy(chain), copy.deepcopy(chain)
    out = {}

    def prune(linear: nn.Linear, read: Tensor) -> Tensor:
        scores = linear.weight.abs() * read.square().sum(0).sqrt()
        order = scores.view(-1, 4).sort(dim=1, stable=True).indices[:, :2]
        mask = torch.zeros_like(scores.view(-1, 4), dtype=torch.bool).scatter_(1, order, True)
        return linear.weight.masked_fill(mask.view_as(scores), 0)

    dense = x
    for i, (block, run) in enumerate(zip(measured.layers, running.layers, strict=True)):
        first, second = block[0], block[2]
        before = dense if schedule == "dense" else x
        new_first = prune(first, before)
        middle = nn.functional.linear(before, new_first if schedule == "layer" else first.weight, first.bias).relu()
        new_second = prune(second, middle)
        out[f"layers.{i}.0.weight"], out[f"layers.{i}.2.weight"] = new_first, new_second
        run[0].weight.copy_(new_first)
        run[2].weight.copy_(new_second)
        dense = dense + chain.layers[i](dense)
        x = x + run(x)
    return out


@pytest.mark.parametrize("schedule", ["layer", "block", "dense"])
def test_each_schedule_by_hand(schedule: str) -> None:
    chain = Chain()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    ours = pruned_weights(chain, [x[:20], x[20:]], schedule=schedule)
    with torch.no_grad():
        expected = by_hand(chain, x, schedule)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_the_schedules_differ() -> None:
    chain, x = Chain(), torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    results = [pruned_weights(chain, [x], schedule=s)["layers.1.2.weight"] for s in ("layer", "block", "dense")]
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


@pytest.mark.parametrize("schedule", ["layer", "block", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_in_every_schedule(
    family: str, schedule: Any, captured: Callable[[str], Program]
) -> None:
    batches = [inputs(family, seed=s) for s in (1, 2)]
    _, sites = prune_captured(captured(family), "wanda:50%", batches, schedule)
    assert sites
    for site in sites:
        assert abs(site.kept - 0.5) < 0.02, site.name
        assert site.error is not None and 0 < site.error < 1


@pytest.mark.parametrize("schedule", ["layer", "block", "dense"])
def test_padding_counts_nowhere(schedule: Any) -> None:
    """Right-padded sequences with a mask prune like the same sequences without padding, whatever the pad says."""
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([torch.ones(3, 12), torch.zeros(3, 6)], dim=1).long()
    plain, _ = prune_captured(traced("llama", 3, 12)[1], "wanda:2:4", [{"input_ids": ids}], schedule)
    for pad in (0, 9):
        padded = {"input_ids": torch.cat([ids, torch.full((3, 6), pad)], dim=1), "attention_mask": mask}
        masked, _ = prune_captured(traced("llama", 3, 18, masked=True)[1], "wanda:2:4", [padded], schedule)
        assert all(torch.equal(masked[name], plain[name]) for name in plain)


def test_padding_counts_nowhere_for_routed_experts() -> None:
    model = build("mixtral")
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([torch.ones(3, 12), torch.zeros(3, 6)], dim=1).long()
    plain = pruned_weights(model, [{"input_ids": ids}])
    padded = torch.cat([ids, torch.full((3, 6), 9)], dim=1)
    masked = pruned_weights(model, [{"input_ids": padded, "attention_mask": mask}])
    assert all(torch.equal(masked[name], plain[name]) for name in plain)


def test_encoder_and_decoder_have_masks_of_their_own() -> None:
    model = build("t5")
    generator = torch.Generator().manual_seed(0)
    ids, decoder = (torch.randint(3, 60, (2, 8), generator=generator) for _ in range(2))
    plain = pruned_weights(model, [{"input_ids": ids, "decoder_input_ids": decoder}])
    mask = torch.cat([torch.ones(2, 8), torch.zeros(2, 4)], dim=1).long()

    def pad(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full((2, 4), 7)], dim=1)

    both = {
        "input_ids": pad(ids),
        "attention_mask": mask,
        "decoder_input_ids": pad(decoder),
        "decoder_attention_mask": mask,
    }
    masked = pruned_weights(model, [both])
    same = [torch.equal(masked[name] == 0, plain[name] == 0) for name in plain]
    assert all(same)


def test_batches_of_equal_shape_and_other_content_all_count() -> None:
    chain = Chain()
    one, two = (torch.randn(16, 16, generator=torch.Generator().manual_seed(s)) * s for s in (1, 2))
    together = pruned_weights(chain, [torch.cat([one, two])])
    apart = pruned_weights(chain, [one, two])
    assert all(torch.equal(together[name], apart[name]) for name in together)
    assert any(not torch.equal(apart[n], pruned_weights(chain, [one, one])[n]) for n in apart)


def test_experts_that_no_token_reached_fall_back_to_magnitude_and_are_listed() -> None:
    model = build("mixtral")
    with torch.no_grad():
        # Routers that know no difference send every token to the same two experts.
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    result = sparsify.compile(model, ["wanda:2:4"], calibration=torch.randint(3, 60, (2, 8)))
    stacks = [s for s in result.runs[0].sites if "experts" in s.name]
    assert stacks and all(len(s.without_data) == 2 for s in stacks)
    unseen = stacks[1].without_data[0]
    weight = model.model.layers[0].mlp.experts.down_proj.data[unseen]
    order = weight.abs().view(-1, 4).sort(dim=1, stable=True).indices[:, :2]
    mask = torch.zeros_like(weight.view(-1, 4), dtype=torch.bool).scatter_(1, order, True).view_as(weight)
    assert torch.equal(result.weight("model.layers.0.mlp.experts.down_proj")[unseen], weight.masked_fill(mask, 0))


def test_statistics_of_experts_are_those_of_their_own_tokens() -> None:
    """Against a loop over tokens with the router's own choices."""
    model = build("qwen3_moe")
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    ours = pruned_weights(model, ids, schedule="dense")["model.layers.0.mlp.experts.gate_up_proj"]
    block, seen = model.model.layers[0].mlp, {}

    def watch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen["x"] = args[0].reshape(-1, args[0].shape[-1])
        seen["choice"] = args[1]

    hook = block.experts.register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    weight = block.experts.gate_up_proj.data
    for expert in range(4):
        rows = seen["x"][(seen["choice"] == expert).any(dim=1)]
        scores = weight[expert].abs() * rows.double().square().sum(0).sqrt().float()
        order = scores.view(-1, 4).sort(dim=1, stable=True).indices[:, :2]
        mask = torch.zeros_like(scores.view(-1, 4), dtype=torch.bool).scatter_(1, order, True).view_as(scores)
        assert torch.equal(ours[expert] == 0, mask)


class Repeated(nn.Module):
    """One linear used three times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.inner(x).tanh()
        return self.outer(x)


@pytest.mark.parametrize("schedule", ["layer", "block", "dense"])
def test_a_weight_used_repeatedly_is_pruned_once_with_merged_statistics(schedule: Any) -> None:
    module, x = Repeated(), torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    ours = pruned_weights(module, [x], "wanda:50%", schedule=schedule)
    reads, value = [], x
    with torch.no_grad():
        for _ in range(3):
            reads.append(value)
            value = module.inner(value).tanh()
    scores = module.inner.weight.abs() * torch.cat(reads).double().square().sum(0).sqrt().float()
    order = scores.sort(dim=1, stable=True).indices[:, :8]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(ours["inner.weight"] == 0, mask)


def test_schedule_dense_goes_on_with_a_dense_shared_weight() -> None:
    """The second and third use, and what follows them, are measured with the weight as it was."""
    module, x = Repeated(), torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    ours = pruned_weights(module, [x[:10], x[10:]], "wanda:50%", schedule="dense")
    with torch.no_grad():
        value = x
        for _ in range(3):
            value = module.inner(value).tanh()
    scores = module.outer.weight.abs() * value.double().square().sum(0).sqrt().float()
    order = scores.sort(dim=1, stable=True).indices[:, :8]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(ours["outer.weight"] == 0, mask)
    felt = pruned_weights(module, [x[:10], x[10:]], "wanda:50%", schedule="layer")
    assert not torch.equal(felt["outer.weight"], ours["outer.weight"])


@pytest.mark.parametrize("budget", [0, 3000, 1 << 30])
@pytest.mark.parametrize("schedule", ["layer", "block"])
def test_the_memory_budget_changes_no_mask(budget: int, schedule: Any) -> None:
    ids = torch.randint(3, 60, (6, 64), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": row[None]} for row in ids]
    usual, _ = prune_captured(traced("llama", 1, 64)[1], "wanda:2:4", batches, schedule)
    tight, _ = prune_captured(traced("llama", 1, 64)[1], "wanda:2:4", batches, schedule, memory=budget)
    assert all(torch.equal(usual[name], tight[name]) for name in usual)


def test_the_error_is_exact_where_the_tokens_are_few() -> None:
    chain, x = Chain(), torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    result = sparsify.compile(chain, ["wanda:2:4"], calibration=[x[:50], x[50:]])
    site = result.runs[0].sites[0]
    before, after = chain.layers[0][0].weight, result.weight("layers.0.0.weight")
    before = before.detach()
    exact = (x @ (before - after).t()).norm() / (x @ before.t()).norm()
    assert site.error == pytest.approx(float(exact), rel=1e-5)


def test_the_error_is_close_where_it_is_sketched() -> None:
    chain = Chain()
    x = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1))
    x[7] *= 300  # an outlier token, as real models have
    result = sparsify.compile(chain, ["wanda:2:4"], calibration=[x[:10_000], x[10_000:]])
    site = result.runs[0].sites[0]
    before, after = chain.layers[0][0].weight, result.weight("layers.0.0.weight")
    before = before.detach()
    exact = (x @ (before - after).t()).norm() / (x @ before.t()).norm()
    assert site.error == pytest.approx(float(exact), rel=0.05)


def test_a_nan_activation_names_the_site() -> None:
    chain = Chain()
    x = torch.randn(8, 16)
    with torch.no_grad():
        chain.layers[0][2].bias[3] = float("inf")
    with pytest.raises(sparsify.SparsifyError, match=r"input of layers\.1\.0.*batch 0"):
        sparsify.compile(chain, ["wanda:2:4"], calibration=[x, x], allow_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", ["wanda:2:4", "magnitude:50%"])
def test_a_nan_weight_names_the_weight(bad: float, spec: str) -> None:
    chain = Chain()
    with torch.no_grad():
        chain.layers[1][0].weight[2, 3] = bad
    with pytest.raises(sparsify.SparsifyError, match=r"weight layers\.1\.0\.weight: it holds NaN or infinity"):
        sparsify.compile(chain, [spec], calibration=[torch.randn(8, 16)], allow_nan=True)
    with pytest.raises(sparsify.SparsifyError, match=r"tensor layers\.1\.0\.weight of Chain: NaN or infinity"):
        sparsify.compile(chain, [spec], calibration=[torch.randn(8, 16)])


def test_all_zero_inputs_are_refused_by_name() -> None:
    with pytest.raises(sparsify.SparsifyError, match=r"wanda scores of layers\.0\.0.*zero on every"):
        sparsify.compile(Chain(), ["wanda:2:4"], calibration=[torch.zeros(8, 16)])


@pytest.mark.parametrize("schedule", ["layer", "block", "dense"])
def test_what_an_observer_is_told(schedule: Any) -> None:
    """How far pruning is never goes back, and every site has its turn once."""
    told: list[Progress] = []
    mask = (torch.arange(12) < torch.tensor([[12], [9], [7], [12]])).long()
    batches = [{"input_ids": torch.full((2, 12), 5), "attention_mask": part} for part in mask.split(2)]
    options: dict[str, Any] = {"schedule": schedule, "observe": told.append}
    result = sparsify.compile(build("llama"), ["wanda:2:4"], calibration=batches, **options)
    assert list(dict.fromkeys(step.phase for step in told)) == ["loading", "tracing", "pruning"]
    steps = [step for step in told if step.phase == "pruning"]
    # Two blocks; 40 tokens are no padding.
    assert {(step.total, step.unit, step.tokens) for step in steps} == {(2, "layer", 40)}
    done = [step.done for step in steps]
    assert done == sorted(done) and done[0] == 0 and done[-1] == pytest.approx(2, abs=1e-3)
    assert {step.count for step in steps} == {"layer 1/2", "layer 2/2"}
    layers = {int(name.split(".")[2]) + 1: step.count for step in steps if (name := step.what).count(".") > 2}
    assert layers == {1: "layer 1/2", 2: "layer 2/2"}
    sites = [step.site.name for step in told if step.site is not None]
    assert sites == [site.name for site in result.runs[0].sites] and len(set(sites)) == 14
