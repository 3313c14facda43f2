"""Zeros that stay while peft merges adapters into pruned weights, and takes them out again."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.held import learn, pruned, unchanged, zeros
from torch import nn

import sparsify
from sparsify.errors import VerifyError

peft = pytest.importorskip("peft")
NAMES = ["q_proj", "up_proj"]


def config() -> Any:
    # Two matrices that are not zero: an adapter that has learnt.
    return peft.LoraConfig(r=2, target_modules=NAMES, task_type="CAUSAL_LM", init_lora_weights=False)


def wrap(model: nn.Module, adapters: int = 1) -> Any:
    wrapped = peft.get_peft_model(model, config(), adapter_name="0")
    for number in range(1, adapters):
        wrapped.add_adapter(str(number), config())
    return wrapped


def up(model: nn.Module) -> torch.Tensor:
    (weight,) = (p for n, p in model.named_parameters() if "0.mlp.up_proj" in n and "lora_" not in n)
    return weight.detach()


def test_an_adapter_is_merged_under_the_mask() -> None:
    model = pruned()
    before = zeros(model)
    wrapped = wrap(model)
    with sparsify.hold_zeros(wrapped):
        learn(wrapped, torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2))
        merged = wrapped.merge_and_unload()
    assert unchanged(before, merged) and not torch.equal(up(merged), up(pruned()))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("adapters", [1, 2])
def test_merged_and_taken_out_again(safe: bool, adapters: int) -> None:
    """What is taken out was never in pruned entries; of the others it is what it was."""
    model = pruned()
    before = zeros(model)
    wrapped, names = wrap(model, adapters), [str(n) for n in range(adapters)]
    with sparsify.hold_zeros(wrapped):
        wrapped.merge_adapter(names, safe_merge=safe)
        assert unchanged(before, wrapped) and not torch.equal(up(wrapped), up(pruned()))
        wrapped.unmerge_adapter()
        assert unchanged(before, wrapped)
    torch.testing.assert_close(up(wrapped), up(pruned()))
    assert not any("merge" in vars(part) or "unmerge" in vars(part) for part in wrapped.modules())


def test_several_are_merged_and_unloaded() -> None:
    model = pruned()
    before = zeros(model)
    with sparsify.hold_zeros(model):
        merged = wrap(model, 2).merge_and_unload(safe_merge=True, adapter_names=["0", "1"])
        assert unchanged(before, merged) and not torch.equal(up(merged), up(pruned())), "adapters that came later"


def test_within_one_another() -> None:
    model = wrap(pruned())
    before = zeros(model)
    with sparsify.hold_zeros(model):
        with sparsify.hold_zeros(model):
            model.merge_adapter()
        model.unmerge_adapter()
        assert unchanged(before, model)
    model.merge_adapter()
    assert not unchanged(before, model), "held beyond the end"


def test_a_copy_merges_its_own() -> None:
    model = wrap(pruned())
    with sparsify.hold_zeros(model):
        other = copy.deepcopy(model)
        torch.save(model, io.BytesIO())
        other.merge_adapter()
        assert not torch.equal(up(other), up(model)) and torch.equal(up(model), up(pruned()))


def test_a_merge_that_fails_is_masked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(pruned())
    before = zeros(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj

    def fails(part: Any, *args: Any, **kwargs: Any) -> None:
        part.get_base_layer().weight.data += 1
        raise ValueError("half done")

    monkeypatch.setattr(type(layer), "merge", fails)
    with sparsify.hold_zeros(model):
        with pytest.raises(ValueError, match="half done"):
            layer.merge()
        assert unchanged(before, model)


def test_what_is_merged_by_hand_is_told() -> None:
    model = wrap(pruned())
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with pytest.raises(VerifyError, match="up_proj"), sparsify.hold_zeros(model):
        layer.get_base_layer().weight.data += layer.get_delta_weight("0")


def test_adapters_that_are_not_merged_when_it_ends_are_told_of() -> None:
    wrapped = wrap(pruned())
    told = "weights are held no longer, and adapters .* within hold_zeros"
    with pytest.warns(RuntimeWarning, match=told), sparsify.hold_zeros(wrapped):
        pass
    with warnings.catch_warnings(), sparsify.hold_zeros(wrapped):
        warnings.simplefilter("error")
        wrapped.merge_adapter()


def test_after_the_trainer_they_are_merged_under_the_mask(tmp_path: Path) -> None:
    """As everybody does it: train, then merge_and_unload."""
    pytest.importorskip("accelerate")
    model = pruned()
    before, wrapped, hold = zeros(model), wrap(model), sparsify.HoldZeros()
    rows = [{"input_ids": torch.randint(3, 60, (8,)), "labels": torch.randint(3, 60, (8,))} for _ in range(4)]
    said = hf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", learning_rate=1e-2
    )
    hf.Trainer(model=wrapped, args=said, train_dataset=rows, callbacks=[hold]).train()
    merged = wrapped.merge_and_unload()
    assert unchanged(before, merged) and not torch.equal(up(merged), up(pruned()))
    hold.close()
    merged.requires_grad_(True)
    learn(merged, torch.optim.SGD(merged.parameters(), lr=1e-2))
    assert not unchanged(before, merged)
