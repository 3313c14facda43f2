"""``sparsify bench --peers``: the model as other runtimes hold it, and what is refused where they cannot.

llama.cpp is compiled where it is installed, so that few machines have it: what it computes is compared there alone. The
file that it is given is read back everywhere.
"""

from __future__ import annotations

import io
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.families import build, save

import sparsify
from sparsify.backends.bench.benchmark import Benchmark, PeerSpeed, Speed
from sparsify.backends.bench.measure import bench
from sparsify.backends.bench.peers.gguf_file import write_gguf
from sparsify.backends.bench.report import benchmark_report
from sparsify.errors import BackendError, Refused, SpecError
from sparsify.frontend.source import open_source

ROOT = Path(__file__).parents[3]
FEW: dict[str, Any] = {"prompt": 6, "tokens": 3, "rounds": 1, "loading": False, "peers": True}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, str]:
    save("llama", tmp_path / "dense")
    sparsify.compile(tmp_path / "dense", ["magnitude:2:4"], output=tmp_path / "out")
    return tmp_path / "out", str(tmp_path / "dense")


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


def test_without_a_peer_it_says_what_to_install(folders: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "llama_cpp", "onnxruntime_genai")
    with pytest.raises(SpecError, match=r"no peer is installed: llama-cpp-python, onnxruntime-genai miss.*pip"):
        bench(*folders, **FEW)


def test_peers_want_a_dense_model(folders: tuple[Path, str]) -> None:
    out, _ = folders
    sparsify.compile(out, output=out.parent / "packed", to="packed:choice=smallest")
    with pytest.raises(SpecError, match=r"no model to make theirs of\. Give the dense model's folder: --against MODEL"):
        bench(out.parent / "packed", **FEW)
    with pytest.raises(SpecError, match="--against a model that is packed"):
        bench(out, str(out.parent / "packed"), **FEW)


def _like_llama(family: str, **changes: Any) -> Any:
    model = build(family)
    return type(model)(type(model.config)(**{**model.config.to_dict(), **changes})).eval() if changes else model


# Each family of the writer's; Mistral without the window that most models of it have no more.
WRITTEN = {
    "llama": lambda: build("llama"),
    "mistral": lambda: _like_llama("mistral", sliding_window=None),
    "qwen2": lambda: build("qwen2"),
    "qwen3": lambda: build("qwen3"),
}


@pytest.mark.parametrize("family", WRITTEN)
def test_the_file_holds_the_model(family: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = WRITTEN[family]().to(torch.bfloat16)
    assert write_gguf(model, tmp_path / "model.gguf") == "BF16"
    written = open_source(tmp_path / "model.gguf").weights
    for name, value in model.named_parameters():
        assert torch.equal(written.read(name).to(value.dtype), value), name


def test_scaled_positions_are_those_of_the_llama3_formula(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    model = _like_llama("llama", rope_parameters=rope)
    write_gguf(model, tmp_path / "model.gguf")
    (written,) = (t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight")
    head = model.config.hidden_size // model.config.num_attention_heads
    expected = []
    for i in range(0, head, 2):
        length = 2 * math.pi * 10000.0 ** (i / head)
        blend = min(1.0, max(0.0, (32 / length - 1.0) / (4.0 - 1.0)))
        expected.append(1 / ((1 - blend) / 8.0 + blend))
    assert len(set(expected)) > 1 and written.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt2", {}, "a model of type gpt2; llama, mistral, qwen2, qwen3 are known"),
        ("mistral", {"sliding_window": 8}, "attention within a window"),
        ("llama", {"hidden_act": "gelu"}, "the activation gelu, where llama.cpp computes silu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "scaled by dynamic"),
    ],
)
def test_what_the_file_cannot_hold(family: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(BackendError, match=said):
        write_gguf(_like_llama(family, **changes), tmp_path / "model.gguf")


@pytest.mark.parametrize("family", WRITTEN)
def test_llama_cpp_computes_what_torch_does(family: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from sparsify.backends.bench.peers.llama import llama_peers

    model, ids = WRITTEN[family](), torch.tensor([[5, 7, 11, 2]])
    expected = ids
    with torch.no_grad():
        for _ in range(12):
            # That of torch's own generation does not end: it never gives the token that ends a text.
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    peer = next(llama_peers(model, tmp_path))
    assert peer.name == "llama.cpp F32" and peer.nbytes == (tmp_path / "dense.gguf").stat().st_size
    with peer.open() as reader:
        for _ in range(2):
            assert reader.generate(ids, 12).tokens.tolist() == expected[0, 4:].tolist()


def test_llama_cpp_in_turns_with_ours(folders: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    hide(monkeypatch, "onnxruntime_genai")
    result = bench(*folders, **FEW)
    assert [peer.name for peer in result.peers] == ["llama.cpp F32", "llama.cpp Q8_0", "llama.cpp Q4_0"]
    dense, eight, four = (peer.nbytes for peer in result.peers)
    assert dense > eight > four
    assert all(peer.decode.against > 0 and peer.prefill_cpu.ratio > 0 for peer in result.peers)
    # A table breaks lines where it is narrow.
    shown = " ".join(_shown(result).split())
    assert "llama.cpp Q4_0" in shown and "llama-cpp-python 0." in shown


@pytest.mark.slow
def test_genai_in_turns_with_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime_genai")
    hide(monkeypatch, "llama_cpp")
    dense = ROOT / "models" / "pycode-6m"
    result = bench(dense, str(dense), **FEW)
    assert [peer.name for peer in result.peers] == ["genai int8", "genai int4"] and not result.no_peers
    assert result.peers[0].nbytes > result.peers[1].nbytes > 0
    assert all(peer.decode.against > 0 and peer.prefill_cpu.ratio > 0 for peer in result.peers)
    # Its builder wants a tokenizer, which is said.
    alone = tmp_path / "alone"
    shutil.copytree(dense, alone, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(BackendError, match=r"int8 of .*alone: .*with their tokenizer"):
        bench(alone, str(alone), check=False, **FEW)


def test_the_table_fits_80_columns_and_names_what_is_left_out(folders: tuple[Path, str]) -> None:
    result = bench(*folders, **{**FEW, "peers": False})
    slow = Speed(1234.5, 1.0, 100.25, 99.0, 101.0)
    peer = PeerSpeed("llama.cpp Q8_0", "llama-cpp-python 0.3", 3 << 30, slow, slow, slow, slow)
    left = Refused("a model of type gpt2. Convert it", "onnxruntime-genai 0.18")
    said = _shown(replace(result, peers=[peer] * 3, no_peers=[left]))
    assert said.count("100.25×") == 12 and said.count("1234.5") == 6 and max(map(len, said.splitlines())) <= 80
    assert "onnxruntime-genai 0.18 is left out: a model of type gpt2" in said


def _shown(result: Benchmark) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(benchmark_report(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
