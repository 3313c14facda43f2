"""Inputs that a config tells: models run with them, and what it does not tell is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from support.families import VISION
from support.kinds import WAVES, batch, build
from torch import nn
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from sparsify.data.batches import example_batch, load_calibration
from sparsify.data.examples import other_inputs
from sparsify.errors import CalibrationError
from sparsify.frontend.source import open_source


def _sounds() -> Any:
    sizes = {name: VISION[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")}
    return hf.ASTForAudioClassification(
        hf.ASTConfig(**sizes, intermediate_size=64, max_length=32, num_mel_bins=16, frequency_stride=8, time_stride=8)
    )


MORE = {
    "vision": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)),
    "images": lambda: hf.CLIPForImageClassification(hf.CLIPConfig(vision_config=VISION)),
    "video": lambda: hf.VideoMAEModel(hf.VideoMAEConfig(**VISION, num_frames=4)),
    "sounds": _sounds,
    "waves": lambda: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**WAVES)),
}


@pytest.mark.parametrize("kind", ["whisper", "clip", "siglip", "marian", "wav2vec2", "llava", "reward", *MORE])
def test_a_model_runs_with_what_its_config_tells(kind: str) -> None:
    model = MORE[kind]().eval() if kind in MORE else build(kind)
    given = example_batch(open_source(model))
    with torch.no_grad():
        model(**given)
    if kind not in MORE:
        assert given.keys() == batch(kind).keys()


def test_rows_and_dtype() -> None:
    source = open_source(build("whisper"), compute_dtype="bfloat16")
    given = other_inputs(source, 3)
    assert given["input_features"].shape == (3, 8, 40) and given["input_features"].dtype is torch.bfloat16
    assert given["decoder_input_ids"].shape == (3, 16)


def test_what_no_config_tells_is_refused() -> None:
    with pytest.raises(CalibrationError, match="whose inputs are unknown"):
        example_batch(open_source(nn.Linear(8, 8)))
    with pytest.raises(CalibrationError, match="reads input_ids and pixel_values, not text alone"):
        load_calibration("random", open_source(build("clip")))
    with pytest.raises(CalibrationError, match="reads input_features and decoder_input_ids, not text"):
        load_calibration("random", open_source(build("whisper")))
    # Nothing that was not asked for is blamed.
    for kind, says in (("whisper", "reads input_features"), ("reward", "does not generate text from nothing")):
        with pytest.raises(CalibrationError, match=rf"^calibration for .*, none being named: .*{says}"):
            load_calibration(None, open_source(build(kind)))


@pytest.mark.parametrize("kind", ["whisper", "marian"])
def test_decoders_read_the_labels_where_nothing_else_is_given(kind: str) -> None:
    source, given = open_source(build(kind)), batch(kind)
    labels = given.pop("decoder_input_ids").clone()[:, :9]
    labels[0, -2:] = -100
    data = load_calibration([given | {"labels": labels}], source)
    assert torch.equal(data.batches[0]["decoder_input_ids"], shift_tokens_right(labels, 0, 3))
    assert data.labels is not None and torch.equal(data.labels[0], labels)
