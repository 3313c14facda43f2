"""Memory that is not enough: of what, how much there is and what to do is said by every command; no traceback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from support.chain import Chain
from support.command_line import sparsify as command
from support.fake_gpu import FakeGPU
from support.families import build, inputs
from torch import fx

import sparsify
from sparsify.analysis.graph_pass import GraphPass
from sparsify.errors import CalibrationError
from sparsify.evaluation.compare import compare
from sparsify.evaluation.evaluate import evaluate
from sparsify.method.pattern import NM
from sparsify.passes import Wanda
from sparsify.prune.fx_pass import GraphPrune
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.tune import tune

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 16.00 GiB")
SAID = r"out of memory \(2\.00 GiB asked for, 16\.00 GiB of 16\.00 GiB free\)\. Take less --memory .* or --device cpu"
OPERATOR = "sparsify.calibration.interpreter.Interpreter.call_function"
SQUARES = "sparsify.calibration.accumulators.SquaredNorm.of"
X = torch.randn(4, 16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.safetensors"
    save_file({"input_ids": torch.randint(3, 60, (1000,), generator=torch.Generator().manual_seed(0))}, path)
    return path


@pytest.mark.parametrize(
    ("place", "spec", "asked"),
    [
        (SQUARES, "wanda:2:4", r"running the model, before layers\.0\.0\.weight on cuda"),
        (OPERATOR, "wanda:2:4", r"running the model, layers\.0\.0\.weight to layers\.0\.0\.bias on cuda"),
        ("sparsify.passes.wanda.Wanda.mask", "wanda:2:4", r"pruning layers\.0\.0 on cuda"),
        ("sparsify.passes.solvers.fitting.damped_gram", "sparsegpt:2:4", r"pruning layers\.0\.0 on cuda"),
        ("sparsify.prune.allocation.Measured.scores", "wanda:50%,allocation=owl", r"pass wanda on cuda"),
        ("sparsify.frontend.capture.from_exported", "wanda:2:4", r"compiling on cuda"),
    ],
)
def test_a_compile_says_where(place: str, spec: str, asked: str) -> None:
    with FakeGPU(), patch(place, side_effect=FULL), pytest.raises(CalibrationError, match=f"^{asked}: {SAID}"):
        sparsify.compile(Chain(), [spec], calibration=[X], device="cuda")


def test_gradients_say_of_what() -> None:
    asked = r"gradients of model\.layers\.1\.mlp\.down_proj\.weight, model\.layers\.1\.mlp\.gate_proj\.weight on cuda"
    with FakeGPU(), patch("torch.autograd.grad", side_effect=FULL), pytest.raises(CalibrationError, match=asked):
        sparsify.compile(build("llama"), ["gblm:2:4"], calibration=[inputs("llama")], device="cuda")


@dataclass(frozen=True)
class Greedy(GraphPass):
    name: ClassVar[str] = "greedy"
    summary: ClassVar[str] = "wants it all"

    def apply(self, program: Any, batches: Any, context: Any) -> None:
        raise FULL


def test_a_graph_pass_is_not_blamed() -> None:
    with FakeGPU(), pytest.raises(CalibrationError, match=f"^pass greedy on cuda: {SAID}"):
        sparsify.compile(Chain(), [Greedy(), "magnitude:2:4"], calibration=[X], device="cuda")


def test_a_pass_of_torch_fx_says_it_too() -> None:
    graph = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(16, 8)))
    full = patch("sparsify.passes.wanda.Wanda.mask", side_effect=FULL)
    with FakeGPU(), full, pytest.raises(CalibrationError, match=f"^pruning 0 on cuda:0: {SAID}"):
        GraphPrune(Wanda(NM(2, 4)), [X], device=torch.device("cuda:0"))(graph)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUBLAS_STATUS_ALLOC_FAILED"),
        ("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
         "4096 bytes. Error code 12 (Cannot allocate memory)", "4096 bytes asked for"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", [OPERATOR, "sparsify.passes.wanda.Wanda.mask"])
def test_what_libraries_and_the_cpu_say(place: str, error: str, found: str) -> None:
    with patch(place, side_effect=RuntimeError(error)), pytest.raises(CalibrationError) as raised:
        sparsify.compile(Chain(), ["wanda:2:4"], calibration=[X])
    assert f"on cpu: out of memory ({found}" in str(raised.value).replace("CUDA error: ", "")
    assert raised.value.do == "Take less --memory for activations or shorter sequences (--sequence-length)"
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_other_errors_are_left_alone() -> None:
    broken = patch("sparsify.passes.wanda.Wanda.mask", side_effect=RuntimeError("no memory of that"))
    with broken, pytest.raises(RuntimeError, match="no memory of that"):
        sparsify.compile(Chain(), ["wanda:2:4"], calibration=[X])


def test_evaluating_comparing_and_tuning(folder: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    model, data = folder("llama"), str(text)
    more: dict[str, Any] = {"calibration": data, "samples": 2, "sequence_length": 32}
    with FakeGPU(), patch(OPERATOR, side_effect=FULL):
        with pytest.raises(CalibrationError, match=rf"model\.embed_tokens\.weight to .* on cuda: {SAID}"):
            evaluate(model, data, device="cuda", windows=2, sequence_length=32)
        with pytest.raises(CalibrationError, match=f"on cuda: {SAID}"):
            compare(model, ["wanda:2:4"], device="cuda", **more)
    full = patch("sparsify.calibration.recorder.OutputSketch.relative_error", side_effect=FULL)
    with FakeGPU(), full, pytest.raises(CalibrationError, match=f"pruning .* on cuda: {SAID}"):
        compare(model, ["wanda:2:4"], device="cuda", **more)
    pytest.importorskip("peft")
    full = patch("torch.optim.AdamW.step", side_effect=FULL)
    with full, pytest.raises(CalibrationError, match=r"^tuning llama on cpu: .* \(--micro\)"):
        tune(model, data, tmp_path / "out", Recipe(steps=1, batch=2, micro=2, samples=4, length=16))
    assert not (tmp_path / "out").exists()


def test_commands_end_with_a_sentence(folder: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    model, out = folder("llama"), tmp_path / "out"
    data = ("--sequence-length", 32, "--device", "cuda")
    with FakeGPU(), patch(OPERATOR, side_effect=FULL):
        for words in (
            ("compile", model, "--pass", "wanda:2:4", "--calibration", text, "--samples", 2, "-o", out, *data),
            ("eval", model, "--data", text, "--windows", 2, *data),
            ("compare", model, "--passes", "wanda:2:4", "--calibration", text, "--samples", 2, *data),
        ):
            done = command(*words)
            assert done.returncode == 1 and "out of memory (2.00 GiB asked for" in done.stderr, done.stderr
            assert "--device cpu" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing was written"
