"""``--calibration self`` gives the same tokens whatever a model's own generation config says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build, save
from transformers import GenerationConfig

from sparsify.data.batches import load_calibration
from sparsify.data.generate import sample_from_model
from sparsify.errors import CalibrationError
from sparsify.frontend.source import open_source

INHERITED: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": list(range(5, 50)), "begin_suppress_tokens": [3]},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 8, "eos_token_id": [2, 3, 4]},
    "several": {"num_return_sequences": 3, "do_sample": True},
    "time": {"max_time": 0.0001},
    "dictionary": {"return_dict_in_generate": True, "output_scores": True},
    "strings": {"stop_strings": ["the"]},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "beams": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    "other sampling": {"min_p": 0.3, "typical_p": 0.4, "temperature": 9.0, "top_k": 1},
    "cache": {"cache_implementation": "static", "use_cache": False},
    "no use": {"max_new_tokens": 1, "min_new_tokens": 40, "bos_token_id": 9, "pad_token_id": 10},
    "wrong": {"max_new_tokens": "many"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize("name", INHERITED)
def test_nothing_is_inherited_from_a_folder(name: str, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | INHERITED[name]))
    expected = sample_from_model(open_source(plain), 4, 24, 0)
    assert expected.shape == (4, 24) and len({tuple(row) for row in expected.tolist()}) == 4
    assert torch.equal(sample_from_model(open_source(folder), 4, 24, 0), expected)


def test_nor_from_a_module_whose_settings_stay_its_own() -> None:
    model = build("llama")
    expected = sample_from_model(open_source(model), 4, 24, 0)
    model.generation_config = GenerationConfig(repetition_penalty=2.0, num_return_sequences=2, do_sample=True)
    mine, model.training = model.generation_config, True
    assert torch.equal(sample_from_model(open_source(model), 4, 24, 0), expected)
    assert model.generation_config is mine and model.training


def test_a_model_that_stops_early_or_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr(model, "generate", lambda first, **more: first)
    with pytest.raises(CalibrationError, match=r"generates \(4, 1\) where \(4, 24\) tokens were asked for"):
        load_calibration("self", open_source(model), samples=4, sequence_length=24)

    def broken(first: torch.Tensor, **more: Any) -> None:
        raise RuntimeError("no such kernel\nand a trace")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(CalibrationError, match=r"does not generate \(RuntimeError: no such kernel\)"):
        load_calibration("self", open_source(model), samples=4, sequence_length=24)


def test_a_folder_that_transformers_does_not_load(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    source = open_source(folder)
    (folder / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(CalibrationError, match="transformers does not load"):
        load_calibration("self", source, samples=2, sequence_length=8)
