"""Zeros that stay while others train: any optimizer, transformers' Trainer; peft is in test_hold_adapters.py, what
trains in several processes in test_hold_distributed.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from support.held import learn, pruned, unchanged, zeros

import sparsify
from sparsify.errors import SpecError, VerifyError


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop", "Adagrad"])
def test_no_optimizer_changes_a_zero(kind: str) -> None:
    model = pruned()
    before, weights = zeros(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    made = getattr(torch.optim, kind)(model.parameters(), lr=1e-2, weight_decay=0.1)
    with sparsify.hold_zeros(model) as held:
        learn(model, made)
    assert len(held.kept) == 14 and unchanged(before, model)
    assert all(not torch.equal(weights[n], p) for n, p in model.named_parameters())
    learn(model, made)
    assert not unchanged(before, model), "held beyond the end"


def test_what_an_optimizer_of_its_own_does_to_a_zero_is_taken_back() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(torch.randn_like(p) * 1e-3)

    model = pruned()
    before = zeros(model)
    with sparsify.hold_zeros(model):
        learn(model, Noisy(model.parameters(), lr=1e-3))
    assert unchanged(before, model)


def test_what_is_written_by_hand_is_told() -> None:
    model = pruned()
    with pytest.raises(VerifyError, match="without an optimizer's step"), sparsify.hold_zeros(model):
        model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    assert int((model.model.layers[0].mlp.up_proj.weight == 0).sum()) == 64 * 16


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(SpecError, match="nothing is pruned"), sparsify.hold_zeros(build("llama")):
        pass


def test_a_trainer_keeps_every_zero(tmp_path: Path) -> None:
    """Without the callback three steps leave none of them."""
    pytest.importorskip("accelerate")
    import transformers as hf

    rows = [{"input_ids": torch.randint(3, 60, (8,)), "labels": torch.randint(3, 60, (8,))} for _ in range(6)]
    shares = []
    for callbacks in ([], [sparsify.HoldZeros()]):
        model = pruned()
        before = zeros(model)
        options = hf.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[],
            save_strategy="no", weight_decay=0.1,
        )  # fmt: skip
        hf.Trainer(model=model, args=options, train_dataset=rows, callbacks=callbacks).train()
        after = zeros(model)
        shares.append(
            sum(int((before[n] & after[n]).sum()) for n in before) / sum(int(m.sum()) for m in before.values())
        )
    assert shares[0] < 0.5 and shares[1] == 1


@pytest.mark.parametrize("trained", [True, False])
def test_a_weight_in_the_place_of_a_held_one_is_said(trained: bool) -> None:
    model = pruned()
    with pytest.raises(VerifyError, match="another parameter in its place"), sparsify.hold_zeros(model):
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
        if trained:
            learn(model, torch.optim.AdamW(model.parameters()))


def test_weights_may_be_loaded_and_converted_meanwhile() -> None:
    model = pruned()
    before = zeros(model)
    with sparsify.hold_zeros(model):
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()})
        model.double().float()
        learn(model, torch.optim.AdamW(model.parameters()))
    assert unchanged(before, model)


def test_few_zeros_are_held_as_many_are() -> None:
    """One weight pruned to a half, one to four in a hundred, and one that has a single zero beside them."""
    model = build("llama").train()
    layer = model.model.layers[0]
    for weight, share in ((layer.mlp.up_proj.weight, 0.5), (layer.mlp.down_proj.weight, 0.04)):
        weight.data.masked_fill_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < share, 0)
    layer.self_attn.q_proj.weight.data[3, 5] = 0
    before = zeros(model)
    with sparsify.hold_zeros(model) as held:
        learn(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert len(held.kept) == 3 and unchanged(before, model)


def test_one_zero_of_a_dense_model_is_chance() -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 0
    with pytest.raises(SpecError, match="nothing is pruned"), sparsify.hold_zeros(model):
        pass
