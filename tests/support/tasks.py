"""Small tasks of lm-eval with files of their own, a model that answers them, and the slow way to their accuracy."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from support.tokenizers import of_bytes

WORDS = ("apple", "stone", "river", "clouds", "tree", "lantern", "ember", "sevens")
Row = dict[str, Any]


def speaker(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Llama of two blocks in float32 with a tokenizer of bytes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tokens = {"vocab_size": 264, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(sizes | tokens | changes))).eval()
    with torch.no_grad():
        # Far from guessing: what it says of two texts differs by more than rounding does.
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    of_bytes().save_pretrained(folder)
    return folder


def rows(count: int = 24, seed: int = 0) -> list[Row]:
    """Questions with four answers of different lengths, the right one drawn."""
    drawn = random.Random(seed)
    return [
        {
            "question": f"What is {drawn.choice(WORDS)} {number}?",
            "choices": [f" {word}" for word in drawn.sample(WORDS, 4)],
            "answer": drawn.randrange(4),
        }
        for number in range(count)
    ]


def task(folder: Path, name: str, content: Sequence[Row], **changes: Any) -> Path:
    """A task of multiple choice, or what ``changes`` make of it: its file in ``folder``."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.json"
    data.write_text("\n".join(map(json.dumps, content)))
    said: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    return written(folder / f"{name}.yaml", {k: v for k, v in (said | changes).items() if v is not None})


def written(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content)))
    return path


@torch.no_grad()
def likelihood(model: Any, tokenizer: Any, context: str, text: str) -> tuple[float, bool]:
    """log P(text | context), token by token in one plain forward, and whether each token is the likeliest."""
    before, after = tokenizer(context)["input_ids"], tokenizer(text)["input_ids"]
    logits = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    places = range(len(before) - 1, len(before) + len(after) - 1)
    total = sum(float(logits[place, token]) for place, token in zip(places, after, strict=True))
    return total, all(int(logits[p].argmax()) == token for p, token in zip(places, after, strict=True))


def slow_samples(model: Any, tokenizer: Any, content: Sequence[Row]) -> dict[str, list[float]]:
    """Of each question whether the likeliest answer is right, by the sum and by the sum over the text's length."""
    found: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for row in content:
        sums = [likelihood(model, tokenizer, row["question"], choice)[0] for choice in row["choices"]]
        lengths = [len(choice) for choice in row["choices"]]
        normed = [value / length for value, length in zip(sums, lengths, strict=True)]
        for metric, values in (("acc", sums), ("acc_norm", normed)):
            found[metric].append(float(values.index(max(values)) == row["answer"]))
    return found
