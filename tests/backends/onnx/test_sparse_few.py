"""``weights=sparse`` with values of few bits, with stacks of experts, and the library that lies beside the graph."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from support.command_line import sparsify as command
from support.folders import load
from support.onnx_models import greedy, padded

import sparsify
from sparsify.backends.onnx.api import export_onnx
from sparsify.backends.onnx.backend import ONNX
from sparsify.backends.onnx.expand import expand
from sparsify.backends.onnx.products.library import FILE
from sparsify.backends.onnx.running.runner import Runner
from sparsify.backends.onnx.storage.store import GraphStore
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.errors import BackendError, CheckpointError, SpecError
from sparsify.runtime.cpu import native

SPARSE = "onnx:weights=sparse"
pytestmark = pytest.mark.skipif(native.library() is None, reason="no kernels here, and no C++ compiler")


def operators(folder: Path) -> set[str]:
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    return {node.op_type for node in nodes if node.domain == "sparsify"}


def asked(folder: Path) -> str | None:
    config = json.loads((folder / "genai_config.json").read_text())
    return config["model"]["decoder"]["session_options"].get("custom_ops_library")  # type: ignore[no-any-return]


@pytest.mark.first(2)
@pytest.mark.parametrize(
    ("family", "passes", "options", "expected"),
    [
        ("llama", ["magnitude:2:4", "round:int8,compensation=none"], "", "Int8"),
        ("mixtral", ["magnitude:50%", "round:int4,group=32,compensation=none"], "", "Int4"),
        ("llama", ["round:int4,group=32,compensation=none"], ",activations=float", "Int4"),
        ("llama", ["magnitude:2:4"], ",values=int8", "Int8"),
        ("gpt2", ["magnitude:2:4"], ",values=int4,group=32", "Int4"),
    ],
)
def test_a_rounded_model_is_multiplied_as_integers(
    family: str, passes: list[str], options: str, expected: str, written: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Weights to the bit, outputs as near as rounded inputs let them be, and dense again by ``expand``."""
    source = written(family, "dense")
    made = sparsify.compile(source, passes, to=SPARSE + options, output=tmp_path / "out")
    folder = tmp_path / "out"
    assert all(name.endswith(expected) for name in operators(folder)) and operators(folder)
    assert any(name.startswith("Experts") for name in operators(folder)) == (family == "mixtral")
    found = verify_onnx(folder)
    assert found.sound and found.sparse and not found.unchecked, found.problems
    assert any(" int" in weight.format and weight.equal for weight in found.weights)
    assert any("rounded to nearest" in note for note in made.notes) == ("values" in options)
    dense = expand(folder, tmp_path / "dense")
    assert not operators(dense) and verify_onnx(dense).sound
    if not options.startswith(",values"):
        want = sparsify.compile(source, passes, to="hf", output=tmp_path / "hf").output
        have = {name: tensor for path in want.glob("*.safetensors") for name, tensor in load_file(path).items()}
        read = {name: tensor for path in dense.glob("*.safetensors") for name, tensor in load_file(path).items()}
        assert all(torch.equal(tensor, have[name]) for name, tensor in read.items())


def test_inputs_that_are_not_rounded_give_the_tokens_of_transformers(
    written: Callable[[str, str], Path], tmp_path: Path
) -> None:
    for family in ("llama", "mixtral"):
        passes = ["magnitude:2:4", "round:int8,compensation=none"]
        out, plain = tmp_path / family / "out", tmp_path / family / "hf"
        sparsify.compile(written(family, "dense"), passes, to=SPARSE + ",activations=float", output=out)
        sparsify.compile(written(family, "dense"), passes, to="hf", output=plain)
        ids, mask = padded()
        got = np.stack(list(Runner(out).generate(ids.numpy(), mask.numpy(), tokens=30)), 1)
        assert (got == greedy(load(plain), ids, mask, 30)).all()


def test_integers_keep_their_dtype_where_that_is_asked_for(written: Callable[[str, str], Path], tmp_path: Path) -> None:
    passes = ["magnitude:2:4", "round:int8,compensation=none"]
    sparsify.compile(written("llama", "dense"), passes, to=SPARSE + ",values=full", output=tmp_path / "out")
    assert not [name for name in operators(tmp_path / "out") if "Int" in name]
    assert not GraphStore(tmp_path / "out" / "model.onnx").of_few_bits()


def test_the_library_lies_beside_the_graph_and_genai_runs_it(
    written: Callable[[str, str], Path], tmp_path: Path
) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel here")
    folder = written("llama", SPARSE)
    assert (folder / FILE).read_bytes() == Path(sparsify.onnx_library()).read_bytes() and asked(folder) == FILE
    assert f'register_custom_ops_library("FOLDER/{FILE}")' in (folder / "README.md").read_text()
    assert FILE in json.loads((folder / "sparsify.json").read_text())["digests"]["files"]
    want = [int(t[0]) for t in Runner(folder).generate(np.array([[5, 6, 7]]), tokens=20)]
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=23, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([[5, 6, 7]], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[3:].tolist() == want
    dense = expand(folder, tmp_path / "dense")
    assert asked(dense) is None and not (dense / FILE).exists()


def test_a_spoilt_genai_config_is_refused_by_its_path(written: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Whether it asks for the library cannot be told; where it is another's, it stays as it is."""
    folder = shutil.copytree(written("llama", SPARSE), tmp_path / "sparse")
    sound = (folder / "genai_config.json").read_bytes()
    for content in (sound.replace(b"llama", b"ll\xa8ma"), sound[:-9], b"", b"[1]", b"[" * 100_000):
        (folder / "genai_config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(f"{folder / 'genai_config.json'}")):
            expand(folder, tmp_path / "out", check=False)
        assert not (tmp_path / "out").exists()
    for content in (b"{}", b'{"model": 3}', b'{"model": {"decoder": {"session_options": [1]}}}'):
        (folder / "genai_config.json").write_bytes(content)
        out = expand(folder, tmp_path / "out", check=False, overwrite=True)
        assert json.loads((out / "genai_config.json").read_text()) == json.loads(content)


def test_a_library_that_cannot_be_made_is_said_and_the_folder_written(
    written: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise BackendError("sparsify's operators", found="no C++ compiler was found", do="Install one")

    monkeypatch.setattr("sparsify.backends.onnx.products.library.onnx_library", missing)
    made = sparsify.compile(written("llama", "dense"), "magnitude:2:4", to=SPARSE, output=tmp_path / "out")
    assert any("no C++ compiler was found" in note and FILE in note for note in made.notes)
    assert asked(tmp_path / "out") is None and not (tmp_path / "out" / FILE).exists()


@pytest.mark.slow
def test_a_folder_without_safetensors_is_a_model_to_every_command(
    written: Callable[[str, str], Path], tmp_path: Path
) -> None:
    for to in (SPARSE, "onnx:weights=packed", "onnx:weights=external"):
        folder, out = written("llama", to), tmp_path / to.rpartition("=")[2]
        shown = command("inspect", folder)
        assert shown.returncode == 0 and "down_proj" in shown.stdout, shown.stderr
        # Once more, so that nothing changes.
        sparsify.compile(folder, "magnitude:2:4", output=out)
        assert not [path for path in out.iterdir() if path.suffix in (".so", ".onnx", ".data") or "genai" in path.name]
        want = load(written("llama", "hf")).state_dict()
        assert all(torch.equal(tensor, want[name]) for name, tensor in load(out).state_dict().items())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"values": "int8"}, "onnx:weights=link,values=int8"),
        ({"weights": "packed", "activations": "float"}, "onnx:weights=packed,activations=float"),
        ({"weights": "sparse", "group": "32"}, "onnx:values=auto,group=32"),
        ({"weights": "sparse", "values": "int8", "dtype": "float16"}, "onnx:values=int8,dtype=float16"),
    ],
)
def test_words_that_do_not_go_together_are_refused(options: dict[str, str], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        ONNX(**options)  # type: ignore[arg-type]


def test_a_graph_of_the_users_own_is_not_rounded(tmp_path: Path) -> None:
    backend = ONNX(weights="sparse", values="int8")
    graph = torch.export.export(torch.nn.Linear(8, 8), (torch.randn(2, 8),))
    with pytest.raises(SpecError, match="onnx:values=int8 for a graph"):
        export_onnx(graph, tmp_path / "out", backend=backend, example_inputs=[torch.randn(2, 8)])
    assert not (tmp_path / "out").exists()
