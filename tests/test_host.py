"""Words for a device, and what is said where there is none."""

from __future__ import annotations

import gc
import weakref
from unittest.mock import patch

import pytest
import torch
from support.command_line import sparsify as command

from sparsify.errors import SpecError
from sparsify.host import free_memory, resolve_device, young_heap


def test_devices_that_are_here() -> None:
    assert resolve_device("cpu") == resolve_device("auto") == torch.device("cpu")
    assert free_memory(torch.device("cpu")) is None and free_memory(torch.device("cuda")) is None


@pytest.mark.parametrize("word", ["cuda", "cuda:1", "meta", "gpu", "cuda:x", ""])
def test_devices_that_are_not(word: str) -> None:
    with pytest.raises(SpecError, match=f"^device '{word}': none that works on this machine .*Use auto, cpu$"):
        resolve_device(word)


def test_a_gpu_that_is_there_and_fails() -> None:
    """One that torch has no kernels for, or whose memory is full: the reason is told, and the others that there are."""
    there = patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 2)
    broken = patch("torch.ones", side_effect=RuntimeError("CUDA error: no kernel image\nand more"))
    for word in ("auto", "cuda:1"):
        with there, broken, pytest.raises(SpecError, match=r"no kernel image\)\. Use auto, cpu, cuda:0, cuda:1$"):
            resolve_device(word)


@pytest.mark.parametrize("words", [("compile", "none", "--pass", "wanda:2:4"), ("eval", "none", "--data", "none")])
def test_a_command_says_it_before_a_model_is_opened(words: tuple[str, ...]) -> None:
    done = command(*words, "--device", "cuda:3")
    assert done.returncode == 2 and "device 'cuda:3': none that works" in done.stderr


@pytest.mark.parametrize("frozen", [False, True])
def test_a_young_heap_frees_what_was_made_in_it_and_leaves_no_other_object_out(frozen: bool) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.own = self

    gc.unfreeze()
    older = Cycle()
    if frozen:
        gc.freeze()
    try:
        with young_heap():
            made = weakref.ref(Cycle())
            gc.collect()
            assert made() is None
        # Not their number: what was frozen may have died meanwhile.
        assert bool(gc.get_freeze_count()) == frozen
        gone = weakref.ref(older)
        del older
        gc.unfreeze()
        gc.collect()
        assert gone() is None
    finally:
        gc.unfreeze()


def test_a_young_heap_ends_with_an_error() -> None:
    gc.unfreeze()
    with pytest.raises(ValueError, match="within"), young_heap():
        raise ValueError("within")
    assert gc.get_freeze_count() == 0
