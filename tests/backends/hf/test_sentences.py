"""A folder of sentence-transformers, pruned: the package loads it, dense layer and pooling included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sparsify

TEXTS = ["def one(): return 1", "import os", "class Thing:\n    pass"]
MODULES = ["", "1_Pooling", "2_Dense"]
TYPES = ["Transformer", "Pooling", "Dense"]


@pytest.fixture
def folder(tmp_path: Path, bundled: Path) -> Path:
    """An encoder with mean pooling and a projection, as the package saves them."""
    torch.manual_seed(0)
    size = json.loads((bundled / "config.json").read_text())["vocab_size"]
    config = transformers.BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=64, max_position_embeddings=64)  # fmt: skip
    made = tmp_path / "model"
    transformers.BertModel(config).save_pretrained(made)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, made)
    settings = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": settings["eos_token"]}))
    parts = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(zip(MODULES, TYPES, strict=True))
    ]
    (made / "modules.json").write_text(json.dumps(parts))
    (made / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))
    for name, content in (
        ("1_Pooling", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}),
        ("2_Dense", {"in_features": 32, "out_features": 8, "bias": True,
                     "activation_function": "torch.nn.modules.activation.Tanh"}),
    ):  # fmt: skip
        (made / name).mkdir()
        (made / name / "config.json").write_text(json.dumps(content))
    save_file({"linear.weight": torch.randn(8, 32), "linear.bias": torch.randn(8)}, made / "2_Dense/model.safetensors")
    return made


def embed(folder: Path, model: Any) -> torch.Tensor:
    """Embeddings by the parts that lie in the folder, put together by hand."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    dense, steps = load_file(folder / "2_Dense/model.safetensors"), json.loads((folder / "modules.json").read_text())
    assert [step["path"] for step in steps] == MODULES
    assert json.loads((folder / "1_Pooling/config.json").read_text())["pooling_mode_mean_tokens"]
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :32]
        with torch.no_grad():
            rows.append(model(input_ids=ids).last_hidden_state.mean(dim=1))
    return torch.tanh(torch.cat(rows) @ dense["linear.weight"].T + dense["linear.bias"])


@pytest.mark.parametrize("to", ["hf", pytest.param("packed:choice=smallest", marks=pytest.mark.slow)])
def test_its_parts_give_the_embeddings_of_the_pruned_encoder(folder: Path, tmp_path: Path, to: str) -> None:
    made = sparsify.compile(folder, ["magnitude:2:4"], to=to, output=tmp_path / "out")
    assert made.output is not None
    loaded = transformers.AutoModel.from_pretrained(made.output).eval()
    torch.testing.assert_close(embed(made.output, loaded), embed(folder, made.model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_package_loads_it(folder: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers", reason="170 MB with scipy and scikit-learn")
    made = sparsify.compile(folder, ["magnitude:2:4"], output=tmp_path / "out")
    assert made.output is not None
    model = package.SentenceTransformer(str(made.output), device="cpu")
    assert [type(part).__name__ for part in model] == TYPES
    found = torch.tensor(model.encode(TEXTS, batch_size=1))
    torch.testing.assert_close(found, embed(folder, made.model), rtol=1e-3, atol=1e-4)
