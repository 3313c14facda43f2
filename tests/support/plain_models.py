"""Tiny models without a cache: classifiers, embedding models, encoders; and what torch makes of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from support.families import BERT, GQA, LLAMA, VISION
from support.kinds import KINDS
from torch import Tensor

_GQA = {**GQA, "pad_token_id": 0}
_BOTH = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip

_BUILD: dict[str, Callable[[], Any]] = {
    "llama classifier": lambda: hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**{**_GQA, "num_hidden_layers": 1}, num_labels=3)),
    "llama without padding": lambda: hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**{**GQA, "num_hidden_layers": 1}, num_labels=3)),
    "qwen3 embeddings": lambda: hf.Qwen3Model(hf.Qwen3Config(**_GQA, head_dim=8)),
    "mistral embeddings": lambda: hf.MistralModel(hf.MistralConfig(**_GQA, sliding_window=8)),
    "gemma3 embeddings": lambda: hf.Gemma3TextModel(
        hf.Gemma3TextConfig(**_GQA, head_dim=8, sliding_window=8, use_bidirectional_attention=True)),
    "gemma2 classifier": lambda: hf.Gemma2ForSequenceClassification(hf.Gemma2Config(**_GQA, head_dim=8)),
    "gpt-neox classifier": lambda: hf.GPTNeoXForSequenceClassification(hf.GPTNeoXConfig(**LLAMA, pad_token_id=0)),
    "falcon classifier": lambda: hf.FalconForSequenceClassification(
        hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, pad_token_id=0)),
    "bloom classifier": lambda: hf.BloomForSequenceClassification(
        hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64, pad_token_id=0)),
    "bert classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**{**BERT, "num_hidden_layers": 1})),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**BERT, pad_token_id=0)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=64, max_position_embeddings=64)),
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**BERT, embedding_size=16)),
    "deberta": KINDS["deberta"],
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**LLAMA, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0, cls_token_id=1,
                            sep_token_id=2)),
    "esm": lambda: hf.EsmForMaskedLM(
        hf.EsmConfig(**BERT, pad_token_id=0, mask_token_id=3, position_embedding_type="rotary")),
    "t5 encoder": lambda: hf.T5EncoderModel(
        hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BOTH)),
    "clip text": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**BERT, bos_token_id=1, eos_token_id=2)),
    "clip vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"})),
}  # fmt: skip

PLAIN = sorted(_BUILD)


def plain(name: str) -> Any:
    """A seeded model whose norms and biases differ, which would hide swapped channels."""
    torch.manual_seed(0)
    model = _BUILD[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def feed(names: list[str], rows: int, length: int) -> dict[str, Tensor]:
    """Seeded inputs; the first row has padding at its end where there is room."""
    generator = torch.Generator().manual_seed(rows * 100 + length)
    found: dict[str, Tensor] = {}
    for name in names:
        if name == "pixel_values":
            found[name] = torch.randn(rows, 3, 32, 32, generator=generator)
        elif name == "attention_mask":
            found[name] = torch.ones(rows, length, dtype=torch.long)
            found[name][0, 4:] = 0
        elif name == "token_type_ids":
            found[name] = torch.randint(2, (rows, length), generator=generator)
        else:
            shape = (rows, length + 2 if name.startswith("decoder") else length)
            found[name] = torch.randint(3, 60, shape, generator=generator)
    if "attention_mask" in found:
        found["input_ids"] *= found["attention_mask"]
    return found


def differences(session: Any, model: Any, rows: int, length: int) -> dict[str, float]:
    """By how much each output of ``session`` differs from ``model``'s, at most."""
    given = feed([i.name for i in session.get_inputs()], rows, length)
    names = [o.name for o in session.get_outputs()]
    got = dict(zip(names, session.run(names, {k: v.numpy() for k, v in given.items()}), strict=True))
    with torch.no_grad():
        want = model(**given)
    assert all(got[name].shape == tuple(want[name].shape) for name in names)
    found = {name: np.abs(got[name] - want[name].numpy()) for name in names}
    mask = given.get("attention_mask")
    if mask is not None:
        # Beyond a sliding window from every token, padding attends to nothing, for which opsets have no one answer.
        found = {n: d[mask.numpy() == 1] if d.shape[:2] == tuple(mask.shape) else d for n, d in found.items()}
    return {name: float(distance.max()) for name, distance in found.items()}


def save_plain(name: str, folder: Path) -> Path:
    plain(name).save_pretrained(folder)
    return folder
