"""``sparsify bench`` of folders of every kind: what it says, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.command_line import sparsify as command
from support.families import save
from support.folders import SMALLEST

import sparsify
from sparsify.backends.bench.benchmark import Benchmark, SiteSpeed
from sparsify.backends.bench.kinds import folder_kind
from sparsify.backends.bench.measure import bench
from sparsify.backends.bench.opening import open_contender
from sparsify.backends.bench.picture import draw_benchmark
from sparsify.backends.bench.report import benchmark_report
from sparsify.errors import BackendError, CheckpointError, SpecError
from sparsify.runtime.cpu.stopwatch import Timing

FEW = {"prompt": 6, "tokens": 3, "rounds": 1, "loading": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One small Llama in every form that there is."""
    root = tmp_path_factory.mktemp("made")
    save("llama", root / "dense")

    def folder(kind: str) -> Path:
        out = root / kind
        if out.exists():
            return out
        if kind == "ragged":
            sparsify.compile(root / "dense", ["llm-pruner:50%,importance=l2,keep_last=1"], output=out)
        else:
            to = {"packed": SMALLEST, "ONNX": "onnx"}.get(kind, "hf")
            sparsify.compile(root / "dense", ["magnitude:2:4"], output=out, to=to)
        return out

    return folder


@pytest.mark.parametrize("kind", ["packed", "checkpoint", "ragged", pytest.param("ONNX", marks=pytest.mark.slow)])
def test_a_folder_of_any_kind_against_the_dense_one(kind: str, made: Callable[[str], Path]) -> None:
    folder = made(kind)
    dense = folder.parent / "dense"
    assert folder_kind(folder) == kind
    result = bench(folder, str(dense), **FEW)  # type: ignore[arg-type]
    assert result.kinds == ("checkpoint", kind) and result.dtypes == ("float32", "float32")
    assert result.prefill is not None and result.decode is not None
    for speed in (result.prefill, result.decode):
        assert speed.against > 0 and speed.out > 0 and speed.low <= speed.ratio <= speed.high
    smaller = kind in ("packed", "ragged")
    assert (result.file_bytes[1] < result.file_bytes[0]) == smaller
    assert bool(result.sites) == (kind == "packed")
    assert benchmark_report(result) is not None
    assert draw_benchmark(result).startswith(b"\x89PNG") and json.dumps(result.as_dict())


def test_two_of_one_kind_are_told_apart_by_their_names(made: Callable[[str], Path]) -> None:
    folder = made("checkpoint")
    result = bench(folder, str(folder.parent / "dense"), **FEW)  # type: ignore[arg-type]
    assert result.columns == ("dense", "checkpoint") and "checkpoint to dense" in _shown(result)
    other = replace(result, folder="/a/long/way/to/the/run-1/out", against="/a/long/way/to/the/run-2/out")
    assert other.columns == ("run-2/out", "run-1/out") and "run-1/out to run-2/out" in _shown(other)
    assert replace(result, kinds=("unpacked", "packed")).columns == ("dense", "packed")
    assert "1.50 MiB" in _shown(replace(result, file_bytes=(3 << 19, 5 << 18))), "not 2 MiB and 1 MiB at 0.833×"


def test_no_figure_of_a_layer_is_cut_at_80_columns(made: Callable[[str], Path]) -> None:
    folder = made("packed")
    result = bench(folder, str(folder.parent / "dense"), **FEW)  # type: ignore[arg-type]
    timing = Timing(torch=123.4e-6, dense=1234.5e-6, packed=1234.5e-6, threads=1)
    layouts = ("bitmask int8", "packed24 int4")
    sites = [SiteSpeed("self_attn.q_proj", 32, (14336, 4096), layout, "packed", timing) for layout in layouts]
    said = _shown(replace(result, sites=sites))
    assert "…" not in said.replace(" … ", "") and said.count("0.10×") == 2 and max(map(len, said.splitlines())) <= 80


def _shown(result: Benchmark) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(benchmark_report(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.slow
def test_two_folders_that_were_both_made(made: Callable[[str], Path]) -> None:
    """Of one model, pruned alike: the same tokens, in torch and in onnxruntime."""
    one, other = made("ONNX"), made("checkpoint")
    for pair in ((one, other), (other, one), (made("packed"), one), (one, one)):
        result = bench(pair[0], str(pair[1]), **FEW)  # type: ignore[arg-type]
        assert result.same_tokens and result.kinds == (folder_kind(pair[1]), folder_kind(pair[0]))


@pytest.mark.slow
def test_generation_is_what_a_slow_reader_generates(made: Callable[[str], Path]) -> None:
    ids = torch.tensor([[5, 7, 11]])
    model = sparsify.load(made("checkpoint"))
    expected = ids
    for _ in range(4):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    for kind in ("checkpoint", "packed", "ONNX"):
        found = open_contender(made(kind)).generate(ids, 4)
        assert found.tokens.tolist() == expected[0, 3:].tolist() and found.seconds > 0, kind


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", *(pytest.param(k, marks=pytest.mark.slow) for k in ("ragged", "ONNX"))])
def test_loading_is_measured_of_every_kind(kind: str, made: Callable[[str], Path]) -> None:
    folder = made(kind)
    result = bench(folder, str(folder.parent / "dense"), prompt=4, tokens=2, rounds=1)
    assert result.loading is not None
    for loading in result.loading:
        assert 0 < loading.seconds < loading.first and loading.peak > loading.before > 0


def test_what_generates_nothing_is_timed_on_one_pass(tmp_path: Path) -> None:
    """An encoder: in torch, and as ONNX for any length."""
    save("bert", tmp_path / "dense")
    for to in ("hf", "onnx"):
        sparsify.compile(tmp_path / "dense", ["magnitude:2:4"], output=tmp_path / to, to=to)
        result = bench(tmp_path / to, str(tmp_path / "dense"), **FEW)  # type: ignore[arg-type]
        assert result.decode is None and result.same_tokens is None
        assert result.prefill is not None and result.prefill.out > 0


def test_no_model_to_measure_against(made: Callable[[str], Path]) -> None:
    for kind in ("checkpoint", "ragged", "ONNX"):
        with pytest.raises(SpecError, match=rf"{kind}.*no model to measure it against\. Give --against MODEL.*dense"):
            bench(made(kind))
    assert bench(made("packed"), **FEW).kinds == ("unpacked", "packed")  # type: ignore[arg-type]


def test_what_cannot_be_measured(made: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        bench(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"a file\. Name a folder"):
        bench(made("checkpoint"), str(tmp_path / "file"))
    # A graph whose folder has lost what says how many tokens there are.
    alone = tmp_path / "alone"
    shutil.copytree(made("ONNX"), alone)
    (alone / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json beside it.*Copy the model's"):
        bench(alone, str(made("checkpoint")), check=False, **FEW)  # type: ignore[arg-type]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises((BackendError, CheckpointError), match=r"model\.onnx|broken"):
        bench(tmp_path / "broken", str(made("checkpoint")), **FEW)  # type: ignore[arg-type]
    # Inputs of another kind.
    save("vit", tmp_path / "vit")
    with pytest.raises(SpecError, match=r"take other inputs: pixel_values.*input_ids"):
        bench(made("checkpoint"), str(tmp_path / "vit"), **FEW)  # type: ignore[arg-type]


def test_devices_that_are_not_there(made: Callable[[str], Path]) -> None:
    dense = str(made("packed").parent / "dense")
    for name in ("abacus", "meta"):
        with pytest.raises(SpecError, match="no such device"):
            bench(made("packed"), dense, device=name)
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match="no CUDA device 0"):
            bench(made("packed"), dense, device="cuda")
    with pytest.raises(SpecError, match="an ONNX graph, which is timed on CPUs"):
        open_contender(made("ONNX"), torch.device("cuda"))


@pytest.mark.slow
def test_from_the_command_line(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("ragged")
    words = ("--prompt", 4, "--tokens", 2, "--rounds", 1, "-o", tmp_path)
    done = command("bench", folder, "--against", folder.parent / "dense", *words)
    assert done.returncode == 0, done.stderr
    assert "ragged to checkpoint" in done.stdout and "decode of 2" in done.stdout and "one layer" not in done.stdout
    assert json.loads((tmp_path / "bench.json").read_text())["kinds"] == ["checkpoint", "ragged"]
    assert "Give --against MODEL" in command("bench", folder).stderr
