"""Plain graphs on other numbers of rows and tokens than they were traced with, at the opsets that are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.families import inputs, run
from support.folders import load
from support.plain_models import PLAIN, differences, plain, save_plain
from torch import Tensor, nn
from torch.nn import functional

import sparsify
from sparsify.backends.onnx import export_onnx
from sparsify.backends.onnx.backend import ONNX
from sparsify.backends.onnx.options import OPSETS
from sparsify.backends.onnx.running.session import open_session
from sparsify.backends.verify.onnx_folder import verify_onnx

SIZES = [(1, 9), (2, 9), (5, 9), (3, 1), (2, 30)]
QUICK = [("llama classifier", 23)]
SLOW = [
    *((name, 23) for name in PLAIN if name not in ("llama classifier", "llama without padding")),
    *(("llama classifier", opset) for opset in OPSETS if opset != 23),
    *zip(("modernbert", "bart", "t5 encoder"), (18, 20, 24), strict=True),
]


@pytest.mark.first(3)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "opset"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_a_plain_graph_equals_torch_on_any_number_of_rows(name: str, opset: int, tmp_path: Path) -> None:
    sparsify.compile(save_plain(name, tmp_path / "dense"), to=ONNX(opset=opset), output=tmp_path / "out")
    session = open_session(tmp_path / "out" / "model.onnx")
    assert all(info.shape[0] == "batch_size" for info in (*session.get_inputs(), *session.get_outputs()))
    for rows, length in SIZES:
        found = differences(session, plain(name), rows, length)
        assert max(found.values()) <= 2e-5, (rows, length, found)
    assert (checked := verify_onnx(tmp_path / "out")).sound, checked.problems


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize(("family", "opset"), [("bert", 18), ("convnext", 20), ("t5", 18), ("vit", 24)])
def test_other_families_at_other_opsets(family: str, opset: int, folder: Callable[[str], Path], tmp_path: Path) -> None:
    sparsify.compile(folder(family), to=ONNX(opset=opset), output=tmp_path / "out")
    session = open_session(tmp_path / "out" / "model.onnx")
    for rows in (1, 2, 5):
        batch = inputs(family, rows=rows, length=9)
        if family in ("bert", "t5"):
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, -3:] = 0
        got = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})[0]
        assert (torch.from_numpy(got) - run(load(folder(family)), batch)).abs().max() <= 5e-6


@pytest.mark.slow
def test_a_classifier_without_a_padding_token_takes_one_row_and_says_so(tmp_path: Path) -> None:
    """transformers refuses more rows: it could not tell where each ends."""
    ids = [torch.randint(3, 60, (1, 8))]
    source = save_plain("llama without padding", tmp_path / "dense")
    result = sparsify.compile(source, to="onnx", output=tmp_path / "out", calibration=ids)
    assert any("one row at a time" in note and "padding token" in note for note in result.notes)
    session = open_session(tmp_path / "out" / "model.onnx")
    assert session.get_inputs()[0].shape == [1, "sequence_length"]
    for length in (1, 9, 30):
        assert max(differences(session, plain("llama without padding"), 1, length).values()) <= 2e-5
    assert verify_onnx(tmp_path / "out").sound


class Reader(nn.Module):
    """Queries, a mask and a rotation of its own, one row of each for all rows of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 4, 3, 8))
        self.mask = nn.Parameter(torch.randn(1, 1, 3, 6))

    def forward(self, x: Tensor) -> Tensor:
        keys = x.reshape(x.shape[0], 6, 1, 8).transpose(1, 2)
        return functional.scaled_dot_product_attention(self.queries, keys, keys, attn_mask=self.mask)


@pytest.mark.parametrize("opset", [23, pytest.param(20, marks=pytest.mark.slow)])
def test_what_a_module_makes_for_all_rows_serves_every_row(opset: int, tmp_path: Path) -> None:
    net = Reader()
    export_onnx(net, tmp_path / "out", opset=opset, example_inputs=[torch.randn(2, 48)])
    session = open_session(tmp_path / "out" / "model.onnx")
    for rows in (1, 2, 5):
        x = torch.randn(rows, 48)
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        assert torch.allclose(got, net(x), atol=1e-5)
