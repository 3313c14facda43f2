"""A folder whose outputs could not be compared, or differ beyond one row, is not sound."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import transformers as hf
from support.command_line import sparsify as command
from support.plain_models import save_plain

import sparsify
from sparsify.backends.verify.onnx_folder import verify_onnx


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    sparsify.compile(save_plain("bert classifier", folder / "dense"), to="onnx", output=folder / "out")
    return folder / "out"


@pytest.fixture
def copied(classifier: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(classifier, tmp_path / "out"))
    (folder / "sparsify.json").unlink()
    return folder


def edit(folder: Path, change: Callable[[onnx.GraphProto], object]) -> None:
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.slow
def test_a_graph_that_holds_one_row_is_no_sound_one(copied: Path) -> None:
    assert verify_onnx(copied).sound

    def hold(graph: onnx.GraphProto) -> None:
        """The logits of the first row for every row, as what was traced with a batch of one would give them."""
        name = graph.output[0].name
        node = next(n for n in graph.node if name in n.output)
        node.output[0] = "all_rows"
        zero = onnx.helper.make_tensor("first", onnx.TensorProto.INT64, [1], [0])
        graph.initializer.append(zero)
        graph.node.append(onnx.helper.make_node("Gather", ["all_rows", "first"], [name], axis=0))
        graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1

    edit(copied, hold)
    found = verify_onnx(copied)
    assert not found.sound and any("output logits for 2 rows" in line for line in found.problems), found.problems


def test_what_could_not_be_compared_fails_and_says_how_to_go_on(copied: Path) -> None:
    (copied / "config.json").unlink()
    result = command("verify", copied)
    assert result.returncode == 1 and "no config.json" in result.stdout and "--weights-only" in result.stdout
    alone = command("verify", copied, "--weights-only")
    assert alone.returncode == 0 and "outputs: not compared, as asked" in alone.stdout


def test_a_graph_that_does_not_run_fails(copied: Path) -> None:
    """It asks for an input that nobody knows how to make."""

    def demand(graph: onnx.GraphProto) -> None:
        graph.input.append(onnx.helper.make_tensor_value_info("rest", onnx.TensorProto.STRING, ["batch_size"]))

    edit(copied, demand)
    found = verify_onnx(copied)
    assert not found.sound and any("outputs: not compared" in line for line in found.problems), found.problems


@pytest.mark.slow
@pytest.mark.parametrize("off", [False, True])
def test_rounding_that_a_model_makes_much_of_is_no_fault(off: bool, tmp_path: Path) -> None:
    """Its logits are a million times the sum of what a norm made to sum to nothing; a shifted one is still wrong."""
    config = hf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, num_labels=2
    )
    torch.manual_seed(0)
    model = hf.BertForTokenClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.fill_(1e6)
    model.save_pretrained(tmp_path / "dense")
    sparsify.compile(tmp_path / "dense", to="onnx", output=tmp_path / "out")
    if off:
        (tmp_path / "out" / "sparsify.json").unlink()

        def shift(graph: onnx.GraphProto) -> None:
            name = graph.output[0].name
            node = next(n for n in graph.node if name in n.output)
            node.output[0] = "before"
            graph.initializer.append(onnx.helper.make_tensor("by", onnx.TensorProto.FLOAT, [1], [20.0]))
            graph.node.append(onnx.helper.make_node("Add", ["before", "by"], [name]))

        edit(tmp_path / "out", shift)
    found = verify_onnx(tmp_path / "out")
    assert found.behaviour is not None and found.behaviour.difference > 1e-4, found
    assert found.sound is not off, found.problems
