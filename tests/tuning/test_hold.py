"""Zeros that stay while others train: any optimizer, transformers' Trainer, peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from torch import Tensor, nn

import sparsify
from sparsify.errors import SpecError, VerifyError


def pruned() -> Any:
    model = build("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "layers" in name:
                weight.view(weight.shape[0], -1, 4)[..., :2] = 0
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() == 0 for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n}


def learn(model: Any, optimizer: Any, steps: int = 3) -> None:
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop", "Adagrad"])
def test_no_optimizer_changes_a_zero(kind: str) -> None:
    model = pruned()
    before, weights = zeros(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    made = getattr(torch.optim, kind)(model.parameters(), lr=1e-2, weight_decay=0.1)
    with sparsify.hold_zeros(model) as held:
        learn(model, made)
    assert len(held.kept) == 14 and all(torch.equal(before[n], mask) for n, mask in zeros(model).items())
    assert all(not torch.equal(weights[n], p) for n, p in model.named_parameters())
    learn(model, made)
    assert any(not torch.equal(before[n], mask) for n, mask in zeros(model).items()), "held beyond the end"


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
    assert all(torch.equal(before[n], mask) for n, mask in zeros(model).items())


def test_what_is_written_by_hand_is_told() -> None:
    model = pruned()
    with pytest.raises(VerifyError, match="without an optimizer's step"), sparsify.hold_zeros(model):
        model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    assert int((model.model.layers[0].mlp.up_proj.weight == 0).sum()) == 64 * 16


def test_a_dense_model_and_a_sharded_one_are_refused() -> None:
    with pytest.raises(SpecError, match="nothing is pruned"), sparsify.hold_zeros(build("llama")):
        pass

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    with (
        pytest.raises(SpecError, match="sharded by FullyShardedDataParallel"),
        sparsify.hold_zeros(FullyShardedDataParallel(pruned())),
    ):
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


def test_an_adapter_is_merged_under_the_mask() -> None:
    peft = pytest.importorskip("peft")
    model = pruned()
    before = zeros(model)
    names = ["q_proj", "up_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))
    with sparsify.hold_zeros(wrapped):
        learn(wrapped, torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2))
        merged = wrapped.merge_and_unload()
    after = zeros(merged)
    assert all(torch.equal(before[n], mask) for n, mask in after.items())
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, pruned().model.layers[0].mlp.up_proj.weight)
