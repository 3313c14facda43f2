"""Products are exact while masks are made, whatever a user set before, and what was set is so afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.chain import Chain
from support.families import build

import sparsify
from sparsify.context import Progress
from sparsify.frontend.source import open_source
from sparsify.precision import exact_products
from sparsify.quality.perplexity import perplexity

BACKENDS: Any = torch.backends


def asked(read: Callable[[], Any]) -> Any:
    """What a setting says; torch refuses to say it where its older and its newer way were mixed."""
    try:
        return read()
    except RuntimeError:
        return "mixed"


def settings() -> dict[str, Any]:
    """Everything that says how torch multiplies."""
    newer = {"cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"}
    owners = {name: getattr(getattr(BACKENDS, name.split(".")[0]), name.split(".")[1]) for name in newer}
    matmul, cudnn = BACKENDS.cuda.matmul, BACKENDS.cudnn
    sums = [f"allow_{t}_reduced_precision_reduction{k}" for t in ("bf16", "fp16") for k in ("", "_split_k")]
    return {
        **{name: owner.fp32_precision for name, owner in owners.items()},
        **{name: getattr(matmul, name, None) for name in (*sums, "allow_fp16_accumulation")},
        "products": asked(torch.get_float32_matmul_precision),
        "convolutions": asked(lambda: cudnn.allow_tf32),
        "benchmark": cudnn.benchmark,
        "deterministic": cudnn.deterministic,
        "generic": BACKENDS.fp32_precision,
    }


def check_exact() -> None:
    found = settings()
    assert all(found[name] in ("none", "ieee") for name in found if "." in name), found
    assert found["products"] == "highest" and found["convolutions"] is False and not found["benchmark"]
    assert not any(value for name, value in found.items() if name.startswith("allow") and not name.endswith("split_k"))


WAYS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "newer": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "the CPU's": lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "all at once": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "convolutions": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "no TF32": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "sums": lambda: setattr(BACKENDS.cuda.matmul, "allow_bf16_reduced_precision_reduction", (False, False)),
    "accumulation": lambda: setattr(BACKENDS.cuda.matmul, "allow_fp16_accumulation", True),
    "benchmark": lambda: setattr(BACKENDS.cudnn, "benchmark", True),
}


@pytest.fixture(autouse=True)
def untouched() -> Any:
    """Whatever a test sets, the next one finds torch as it came."""
    before = settings()
    yield
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for name in ("bf16", "fp16"):
        setattr(BACKENDS.cuda.matmul, f"allow_{name}_reduced_precision_reduction", (True, True))
    BACKENDS.cuda.matmul.allow_fp16_accumulation = BACKENDS.cudnn.benchmark = False
    for owner in (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn):
        owner.fp32_precision = "none"
    assert settings() == before


@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("second", ["nothing", "high", "newer", "convolutions"])
def test_settings_are_set_aside_and_put_back(first: str, second: str) -> None:
    WAYS[first]()
    WAYS[second]()
    before = settings()
    with exact_products():
        check_exact()
        with exact_products():
            check_exact()
        check_exact()
    assert settings() == before
    with pytest.raises(ZeroDivisionError), exact_products():
        _ = 1 / 0
    assert settings() == before


def test_a_compile_and_an_evaluation_are_exact() -> None:
    torch.set_float32_matmul_precision("medium")
    before, looks = settings(), []

    def look(progress: Progress) -> None:
        # Before and after the numbers there are files to be read.
        if progress.phase in ("gradients", "measuring", "pruning", "evaluating"):
            check_exact()
            looks.append(progress)

    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    for spec in ("wanda:2:4", "gblm:2:4", "wanda:50%,allocation=owl"):
        sparsify.compile(build("llama"), [spec], calibration=ids, observe=look)
    sparsify.compile(Chain(), ["sparsegpt:2:4"], calibration=[torch.randn(4, 16)], observe=look)
    perplexity(open_source(build("llama")), ids, sparsify.context.Context(observe=look))
    assert len(looks) > 100 and settings() == before


def test_nothing_is_automatic() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with exact_products():
                assert not torch.is_autocast_enabled("cpu") and torch.is_deterministic_algorithms_warn_only_enabled()
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert torch.is_autocast_enabled("cpu")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_masks_do_not_hang_on_the_default_dtype() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    expected = sparsify.compile(Chain(), ["sparsegpt:2:4"], calibration=[x]).weight("layers.0.0.weight")
    chain = Chain()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = sparsify.compile(chain, ["sparsegpt:2:4"], calibration=[x]).weight("layers.0.0.weight")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_threads_take_turns_and_leave_everything_as_it_was() -> None:
    """A second one would find what the first has set, and put that back."""
    before, entered = settings(), list[dict[str, Any]]()

    def second() -> None:
        with exact_products():
            entered.append(settings())

    other = threading.Thread(target=second)
    with exact_products():
        other.start()
        other.join(0.2)
        assert not entered
    other.join()
    assert len(entered) == 1 and settings() == before
