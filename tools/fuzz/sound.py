"""Sound folders to be spoilt: a small model as it is, pruned, packed, and as ONNX; a tokenizer and texts for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from support.families import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsify.cli.main import application

WORDS = [f"w{number}" for number in range(62)]
TEXT = " ".join(WORDS[number * 7 % 62] for number in range(600))


def make_all(place: Path) -> None:
    """Write every folder below ``place``; what one command needs is imported by then."""
    dense = save("llama", place / "dense")
    _tokenizer(dense)
    save("mixtral", place / "experts")
    _shard(dense, place / "sharded")
    magnitude = ("--pass", "magnitude:2:4", "--quiet")
    _run("compile", dense, *magnitude, "-o", place / "hf")
    _run("compile", dense, *magnitude, "--to", "packed:choice=smallest,layout=packed24", "-o", place / "packed24")
    _run("compile", dense, *magnitude, "--to", "packed:choice=smallest,layout=bitmask", "-o", place / "bitmask")
    _run("compile", place / "experts", *magnitude, "--to", "packed:choice=smallest", "-o", place / "packed-experts")
    for weights in ("link", "external", "packed"):
        _run("compile", dense, *magnitude, "--to", f"onnx:weights={weights}", "-o", place / f"onnx-{weights}")
    (place / "data.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(3)), encoding="utf-8")
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    drawn = ("--calibration", place / "data.jsonl", "--samples", "2", "--sequence-length", "8")
    _run("compile", dense, "--pass", "wanda:2:4", *drawn, "--quiet", "-o", place / "wanda")
    _run("compile", dense, "--pass", "llm-pruner:25%", *drawn, "--quiet", "-o", place / "smaller")
    _run("eval", dense, "--data", place / "text.txt", "--sequence-length", "8", "--windows", "2", "--quiet")
    _run("inspect", place / "packed24", "--json")
    for folder in ("hf", "packed24", "onnx-link"):
        _run("verify", place / folder, "--json")
    _run("unpack", place / "packed24", "-o", place / "unpacked")
    _run("run", place / "onnx-link", "w1 w2", "--tokens", "2")


def _tokenizer(folder: Path) -> None:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<u>", "<s>", *WORDS])}, "<u>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<u>", bos_token="<s>").save_pretrained(folder)


def _shard(dense: Path, into: Path) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM.from_pretrained(dense).save_pretrained(into, max_shard_size="30KB")


def _run(*words: object) -> None:
    application()([*map(str, words)], standalone_mode=False)
