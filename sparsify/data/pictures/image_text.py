"""Chat messages with images as calibration batches, through the model's own processor and its chat template.

A graph is traced for one shape. Texts are padded to one length with an ``attention_mask``, which statistics honour;
what a processor makes of images is left as it is, so that of conversations of several shapes those of one are taken.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.data.chat import Chat, Messages
from sparsify.data.content import as_wanted
from sparsify.data.inputs import USUAL, check_length, default_length, reads_images
from sparsify.data.pictures.images import check_sizes, open_image
from sparsify.data.rows import Lines
from sparsify.data.sources import suffix_of
from sparsify.errors import CalibrationError, SparsifyError, first_line
from sparsify.files.reading import kind_at
from sparsify.frontend.source import Source

# What comes from where files may not: nothing is fetched that was not asked for.
_ELSEWHERE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
# Conversations that are looked at for each that is wanted, at most.
_TRIES = 4
# Inputs that have a number per token of text: [1, tokens, …].
_PER_TOKEN = re.compile(r"input_ids|(decoder_)?attention_mask|(mm_)?token_type_ids|cross_attention_mask")


@dataclass(frozen=True)
class ImageText:
    """``batches`` of one conversation each, all of one shape; ``note`` for the user."""

    batches: list[dict[str, Tensor]]
    note: str


def names_image_text(data: object, source: Source) -> bool:
    """Whether ``data`` names a file of conversations with images, for a model that reads both.

    Raises:
        CalibrationError: a file that is not sound.
    """
    if not isinstance(data, str) or not reads_images(source):
        return False
    path, _, field = data.partition(":")
    if kind_at(path) != "file" or suffix_of(path) not in (".json", ".jsonl"):
        return False
    return Lines(Path(path).expanduser(), field).images > 0


def read_image_text(data: str, source: Source, samples: int, length: int | None, seed: int, chat: Chat) -> ImageText:
    """``samples`` conversations, drawn without repetition, of those whose images have the most frequent shapes; all if
    there are fewer. Conversations without any come last.

    Args:
        length: the most tokens that each may have; longer ones are left out. All are padded behind their end to the
            longest that is taken.

    Raises:
        CalibrationError: an image that cannot be read or lies elsewhere, no processor or one that refuses a
            conversation, or none that fits.
    """
    check_length(length, source)
    path, _, field = data.partition(":")
    file = Path(path).expanduser()
    rows = Lines(file, field)
    processor = _processor(source)
    most = length or default_length(source, USUAL)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    groups: dict[object, list[dict[str, Tensor]]] = {}
    tried = long = 0
    for index in order[: _TRIES * samples]:
        row = rows.row(index)
        if not isinstance(row, Messages):
            continue
        tried += 1
        made = _inputs(row, file.parent, processor, chat)
        if made["input_ids"].shape[1] > most:
            long += 1
            continue
        shape = _shape(made)
        groups.setdefault(shape, []).append(made)
        if shape and len(groups[shape]) == samples:
            break
    if not groups:
        raise CalibrationError(
            f"{samples} conversations of {data}",
            found=f"{tried} looked at, {long} of them longer than {most} tokens",
            do="Give shorter ones, or a larger --sequence-length",
        )
    # Of text alone is what has no shape; those with images are why the file was given.
    chosen = groups[max(groups, key=lambda shape: (shape != (), len(groups[shape])))][:samples]
    longest = max(made["input_ids"].shape[1] for made in chosen)
    batches = [_ready(made, longest, source, processor) for made in chosen]
    other = tried - long - len(chosen)
    note = f"{len(chosen)} of {len(rows)} conversations of {data}, {_said(chosen[0])}, padded to {longest} tokens"
    left = [f"{other} with other images or none"] * bool(other) + [f"{long} of more than {most} tokens"] * bool(long)
    return ImageText(batches, note + (f"; left out: {' and '.join(left)}" if left else ""))


def _processor(source: Source) -> Any:
    from transformers import AutoProcessor

    try:
        made = AutoProcessor.from_pretrained(
            source.folder, trust_remote_code=source.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # its settings may be anything, and its parts may need packages
        raise CalibrationError(
            f"the processor of {source.name}",
            found=first_line(error),
            do="Add what it needs (pip install torchvision, for many), or give batches from Python",
        ) from error
    if not hasattr(made, "image_processor") or not hasattr(made, "tokenizer"):
        raise CalibrationError(
            f"the processor of {source.name}",
            found=f"a {type(made).__name__}, which does not read text and images together",
            do="Add the model's preprocessor_config.json and processor_config.json, or give batches from Python",
        )
    check_sizes(made.image_processor, source)
    return made


def _inputs(row: Messages, folder: Path, processor: Any, chat: Chat) -> dict[str, Tensor]:
    """What the processor makes of a conversation: every tensor, as it is."""
    told: dict[str, Any] = {"tools": row.tools} if row.tools else {}
    if chat.template is not None:
        chat.used = True
        told["chat_template"] = chat.template
    elif not getattr(processor, "chat_template", None) and not getattr(processor.tokenizer, "chat_template", None):
        raise CalibrationError(
            f"chat messages for {chat.source.name}",
            found="a processor without a chat template",
            do="Give one with --chat-template FILE",
        )
    messages = _with_images(row, folder)

    def render(tried: list[dict[str, Any]]) -> str:
        return str(processor.apply_chat_template(tried, tokenize=False, **told))

    try:
        messages = as_wanted(messages, render, row.where, parts=True)
        made = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **told)
        found = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        ids = found.pop("input_ids")
        if ids.dim() != 2 or len(ids) != 1:
            raise ValueError(f"it gives token ids of shape {tuple(ids.shape)}")
        if not row.has_images:
            chat.check_places(ids, row.where)
    except SparsifyError:
        raise
    except Exception as error:  # processors and templates raise whatever they like
        raise CalibrationError(
            f"data '{row.where}'",
            found=f"the model's processor refuses it ({type(error).__name__}: {first_line(error)})",
            do="Mend the messages, or give another template with --chat-template FILE",
        ) from error
    return {"input_ids": ids, "attention_mask": found.pop("attention_mask", torch.ones_like(ids))} | found


def _with_images(row: Messages, folder: Path) -> list[dict[str, Any]]:
    """The messages with every image read, wherever it is named: in its part, or beside the messages."""
    beside = iter(row.pictures)
    messages = []
    for message in row.messages:
        content = message["content"]
        if isinstance(content, str) and row.pictures and "<image>" in content:
            texts = content.split("<image>")
            content = [{"type": "text", "text": texts[0].strip("\n")}] if texts[0].strip("\n") else []
            for text in texts[1:]:
                content += [{"type": "image"}, {"type": "text", "text": text.strip("\n")}]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        messages.append({**message, "content": [_part(part, beside, folder, row.where) for part in parts]})
    if left := len(list(beside)):
        found = f"{left} images beside the messages that no part of them stands for"
        raise CalibrationError(f"data '{row.where}'", found=found, do='Put {"type": "image"} where each belongs')
    return messages


def _part(part: dict[str, Any], beside: Any, folder: Path, where: str) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return part
    if kind not in ("image", "image_url"):
        found = f"a part of type {kind!r}"
        raise CalibrationError(f"data '{where}'", found=found, do="Text and images are read; leave the others out")
    named = next((part[key] for key in ("path", "image", "url", "image_url") if part.get(key) is not None), None)
    named = next(beside, None) if named is None else named
    if isinstance(named, Mapping):
        named = next((named[key] for key in ("path", "url") if named.get(key) is not None), None)
    if not isinstance(named, str):
        raise CalibrationError(
            f"data '{where}'", found="an image without a file", do='Name it: {"type": "image", "path": FILE}'
        )
    if _ELSEWHERE.match(named):
        found = f"an image at {named[:80]}, which is no file"
        raise CalibrationError(f"data '{where}'", found=found, do="Fetch it yourself and give its path; files are read")
    return {"type": "image", "image": open_image(folder / named)}


def _shape(made: Mapping[str, Tensor]) -> object:
    """What has to be the same for one graph: the shape of all that is not text, and what tells how images are laid
    out, for models cut by it."""
    return tuple(
        (name, tuple(value.shape), None if value.is_floating_point() else tuple(value.flatten().tolist()))
        for name, value in sorted(made.items())
        if not _PER_TOKEN.fullmatch(name)
    )


def _said(made: Mapping[str, Tensor]) -> str:
    shapes = (f"{name} {tuple(value.shape)}" for name, value in sorted(made.items()) if not _PER_TOKEN.fullmatch(name))
    return "with " + (", ".join(shapes) or "no images")


def _ready(made: Mapping[str, Tensor], length: int, source: Source, processor: Any) -> dict[str, Tensor]:
    """The inputs padded behind their end to ``length`` tokens, numbers in the model's dtype."""
    pad = getattr(processor.tokenizer, "pad_token_id", None)
    ready = {}
    for name, value in made.items():
        if _PER_TOKEN.fullmatch(name) and (missing := length - value.shape[1]):
            filler = value.new_full((len(value), missing, *value.shape[2:]), (pad or 0) if name == "input_ids" else 0)
            value = torch.cat([value, filler], dim=1)
        ready[name] = (value.to(source.dtype) if value.is_floating_point() else value).contiguous()
    return ready
