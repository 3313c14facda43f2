"""The callback for transformers' Trainer: from the first step to the last, whatever ends the training before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.families import build
from support.held import learn, pruned, unchanged, zeros
from torch.optim.optimizer import _global_optimizer_post_hooks

import sparsify
from sparsify.errors import SpecError

pytest.importorskip("accelerate")


class Failing(hf.Trainer):
    """Stops at its second step, as who presses Ctrl-C does, for so many trainings."""

    failures, error = 1, KeyboardInterrupt

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and self.failures:
            self.failures -= 1
            raise self.error("CUDA out of memory.")
        return super().training_step(*args, **kwargs)


def trainer(model: Any, folder: Path, callbacks: Any = (), kind: Any = Failing, **options: Any) -> Any:
    rows = [{"input_ids": torch.randint(3, 60, (8,)), "labels": torch.randint(3, 60, (8,))} for _ in range(6)]
    said = hf.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_strategy="no", weight_decay=0.1, **options,
    )  # fmt: skip
    return kind(model=model, args=said, train_dataset=rows, callbacks=list(callbacks))


def is_held(model: Any) -> bool:
    before = zeros(model)
    learn(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    return unchanged(before, model)


def test_it_may_be_begun_again(tmp_path: Path) -> None:
    model = pruned()
    before = zeros(model)
    made = trainer(model, tmp_path, [sparsify.HoldZeros()])
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.train().global_step == 3 and unchanged(before, model)
    assert not is_held(model)


def test_after_an_exception_zeros_are_held_until_it_is_told(tmp_path: Path) -> None:
    model = pruned()
    before, hold = zeros(model), sparsify.HoldZeros()
    made = trainer(model, tmp_path, [hold])
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert unchanged(before, model), "as far as it came"
    assert is_held(model), "of the exception nobody told it"
    hold.close()
    assert not is_held(model)


def test_a_batch_that_is_made_smaller_begins_again(tmp_path: Path) -> None:
    """accelerate runs the training once more after running out of memory: the same zeros are held once, not twice."""

    class Large(Failing):
        error: Any = RuntimeError

    model = pruned()
    before, hold = zeros(model), sparsify.HoldZeros()
    made = trainer(model, tmp_path, [hold], Large, auto_find_batch_size=True)
    assert made.train().global_step == 3 and made.failures == 0 and unchanged(before, model)
    assert not is_held(model)


def test_a_dense_model_is_refused_and_nothing_held(tmp_path: Path) -> None:
    model = build("llama")
    hooks = len(_global_optimizer_post_hooks)
    with pytest.raises(SpecError, match="nothing is pruned"):
        trainer(model, tmp_path, [sparsify.HoldZeros()], hf.Trainer).train()
    assert len(_global_optimizer_post_hooks) == hooks
