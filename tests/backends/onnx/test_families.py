"""Exported decoders against transformers: tokens, logits, chunks of a prompt, names of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.families import build, inputs, run
from support.folders import load
from support.onnx_models import endless, export, greedy, logits, padded

import sparsify
from sparsify.backends.onnx.backend import ONNX
from sparsify.backends.onnx.running.runner import Runner
from sparsify.backends.onnx.running.session import open_session
from sparsify.files.checkpoint import Checkpoint

DECODERS = ["llama", "qwen2", "opt", "gpt2", "gemma3", "mixtral", "mamba"]
QUICK = [("llama", 23), ("gpt2", 20), ("mamba", 23)]
# Greedy tokens of every family: tests/backends/verify/test_verify.py.
SLOW = [*((f, 23) for f in DECODERS if (f, 23) not in QUICK), ("llama", 20), ("mixtral", 20)]


@pytest.mark.first(4)
@pytest.mark.parametrize(("family", "opset"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_a_decoder_gives_the_tokens_and_logits_of_transformers(
    family: str, opset: int, written: Callable[[str, str], Path]
) -> None:
    folder = written(family, f"onnx:opset={opset}" if opset != 23 else "onnx")
    model = load(folder)
    runner = Runner(folder)
    ids, mask = padded()
    got = np.stack(list(runner.generate(ids.numpy(), mask.numpy(), tokens=40)), 1)
    assert (got == greedy(model, ids, mask, 40)).all()

    want = logits(model, ids, mask).numpy()
    whole, _ = runner.forward(ids.numpy(), mask.numpy(), runner.empty(2))
    assert np.abs(whole - want)[mask.numpy() == 1].max() <= 1e-5
    # A prompt in pieces, then one token, then several rows alone.
    cache, parts = runner.empty(2), []
    for start, end in ((0, 7), (7, 8), (8, 12)):
        part, cache = runner.forward(ids[:, start:end].numpy(), mask[:, :end].numpy(), cache)
        parts.append(part)
    assert np.abs(np.concatenate(parts, 1) - want)[mask.numpy() == 1].max() <= 1e-5
    for rows, length in ((1, 1), (1, 7), (3, 1)):
        some = torch.randint(3, 60, (rows, length))
        one, _ = runner.forward(some.numpy(), np.ones((rows, length), np.int64), runner.empty(rows))
        assert np.abs(one - logits(model, some, torch.ones_like(some)).numpy()).max() <= 1e-5

    graph = ir.load(folder / "model.onnx").graph
    names = {n for n, v in graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
    assert names == set(Checkpoint(folder).names())
    large = [n for n, v in graph.initializers.items() if n not in names and v.const_value.nbytes > 4096]
    assert not large
    assert {n.domain for n in graph.all_nodes()} == {""}


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "family",
    [
        "vit",
        pytest.param("bert", marks=pytest.mark.slow),
        pytest.param("convnext", marks=pytest.mark.slow),
        pytest.param("t5", marks=pytest.mark.slow),
    ],
)
def test_other_models_are_plain_graphs_with_a_dynamic_batch(
    family: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    sparsify.compile(folder(family), to="onnx", output=tmp_path / "out")
    session = open_session(tmp_path / "out" / "model.onnx")
    for rows in (1, 3):
        batch = inputs(family, rows=rows, length=9)
        if family in ("bert", "t5"):
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, -3:] = 0
        got = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})[0]
        assert np.abs(got - run(build(family), batch).numpy()).max() <= 2e-6


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 24])
def test_the_oldest_and_newest_opsets(opset: int, tmp_path: Path) -> None:
    model, folder = export("llama", tmp_path, opset=opset)
    assert ir.load(folder / "model.onnx").opset_imports == {"": opset}
    ids, mask = padded()
    got = np.stack(list(Runner(folder).generate(ids.numpy(), mask.numpy(), tokens=8)), 1)
    assert (got == greedy(model, ids, mask, 8)).all()


@pytest.mark.slow
def test_a_half_precision_graph_and_matmul(tmp_path: Path) -> None:
    model = endless("llama")
    model.to(torch.float16).save_pretrained(tmp_path / "dense")
    sparsify.compile(tmp_path / "dense", to=ONNX(compute="float16", linear="matmul"), output=tmp_path / "onnx")
    graph = ir.load(tmp_path / "onnx" / "model.onnx").graph
    assert "Gemm" not in {n.op_type for n in graph}
    assert graph.outputs[0].dtype == ir.DataType.FLOAT16
    ids, mask = padded()
    runner = Runner(tmp_path / "onnx")
    got, _ = runner.forward(ids.numpy(), mask.numpy(), runner.empty(2))
    want = logits(model.float(), ids, mask).numpy()
    assert np.abs(got - want)[mask.numpy() == 1].max() <= 2e-3
