"""Chat messages as token ids, through the model's chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.data.content import as_wanted
from sparsify.data.inputs import reads_images
from sparsify.errors import CalibrationError, SparsifyError, SpecError, first_line
from sparsify.files.reading import kind_at
from sparsify.frontend.source import Source
from sparsify.words import path_given

# Bytes of a file that holds a template; the longest of published models has some tens of thousands.
MAX_TEMPLATE = 1 << 20
# What ShareGPT's files call those who speak.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Messages:
    """A conversation: tables with a role and content, the tools that it may call, and pictures that lie beside it."""

    messages: list[dict[str, Any]]
    where: str
    tools: list[Any] | None = None
    pictures: list[Any] = field(default_factory=list)

    @property
    def has_images(self) -> bool:
        """Whether any part of it is an image, or any lies beside it."""
        return bool(self.pictures) or any(
            isinstance(part, dict) and part.get("type") in ("image", "image_url")
            for message in self.messages
            for part in (message["content"] if isinstance(message["content"], list) else ())
        )


Render = Callable[[Messages], Tensor]


def called(value: Any) -> str:
    """What a value of JSON is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return f"a list of {len(value)}, with {called(value[0])} first" if value else "an empty list"
    if isinstance(value, str):
        return "text"
    return "a table" if isinstance(value, dict) else f"a {type(value).__name__}"


def nul_at(text: str, where: str) -> CalibrationError:
    """The error for text with a NUL, which stands in no text: it is of another encoding, or no text."""
    found = f"a NUL (\\u0000) at character {text.index(chr(0)) + 1} of a text"
    return CalibrationError(f"data '{where}'", found=found, do="Write the text anew in its own encoding, or leave it")


def as_messages(value: Any, where: str, row: dict[str, Any] | None = None) -> Messages | None:
    """``value`` as a conversation: ``{"role", "content"}`` or, as in ShareGPT's files, ``{"from", "value"}`` each.

    Args:
        row: what it is a field of: ``tools`` and ``images`` of it belong to the conversation.

    Returns:
        None where it is no list of tables.

    Raises:
        CalibrationError: a table that is no message.
    """
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return None
    messages = [_message(item, f"{where}, message {number}") for number, item in enumerate(value, 1)]
    tools = (row or {}).get("tools")
    if tools is not None and not isinstance(tools, list):
        raise CalibrationError(f"data '{where}'", found=f"tools that are {called(tools)}", do="Give a list")
    pictures = (row or {}).get("images") or (row or {}).get("image") or []
    return Messages(messages, where, tools or None, pictures if isinstance(pictures, list) else [pictures])


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    if isinstance(item.get("from"), str) and "role" not in item:
        role = _SPEAKERS.get(item["from"])
        if role is None or not isinstance(item.get("value"), str):
            found = f"from {item['from']!r} and a value that is {called(item.get('value'))}"
            raise CalibrationError(
                f"data '{where}'", found=found, do=f"Speakers are {', '.join(_SPEAKERS)}, and say text"
            )
        return {"role": role, "content": _sound(item["value"], where)}
    content = item.get("content")
    parts = isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in content)
    silent = content is None and item.get("tool_calls")
    if not isinstance(item.get("role"), str) or not (isinstance(content, str) or parts or silent):
        raise CalibrationError(
            f"data '{where}'",
            found=f"a table of {', '.join(map(str, item)) or 'nothing'}",
            do='A message is {"role": …, "content": …}, its content text or a list of parts with a type',
        )
    for text in [content] if isinstance(content, str) else [part.get("text") for part in content or []]:
        if isinstance(text, str):
            _sound(text, where)
    # Tables of parquet files have every field that any of them has.
    return {"content": content} | {name: held for name, held in item.items() if held is not None}


def _sound(text: str, where: str) -> str:
    if "\0" in text:
        raise nul_at(text, where)
    return text


class Chat:
    """The chat template of a model's tokenizer, or another; ``used``: whether anything has been rendered by it.

    Args:
        template: a file that holds a Jinja template, instead of the tokenizer's.

    Raises:
        SpecError: no such file, or no text.
    """

    def __init__(self, source: Source, template: str | Path | None = None) -> None:
        self.source, self.used = source, False
        self.file = template
        self.template = None if template is None else _read(path_given(template, "--chat-template"))

    @property
    def digest(self) -> str | None:
        """sha256 of the template that was given; None: the tokenizer's own."""
        return None if self.template is None else hashlib.sha256(self.template.encode()).hexdigest()

    def __call__(self, conversation: Messages) -> Tensor:
        """Its token ids, [tokens].

        Raises:
            CalibrationError: messages with more than text, or a template that there is not or that refuses them.
        """
        from jinja2 import TemplateSyntaxError

        self.used = True
        if conversation.has_images:
            do = "The model reads text alone: give text"
            if reads_images(self.source):
                do = (
                    "To calibrate on images name their one .jsonl or .json file itself; of other files, "
                    "and for perplexity, text alone is read"
                )
            raise CalibrationError(f"data '{conversation.where}'", found="images, where text alone is read", do=do)
        told = {"chat_template": self.template} | ({"tools": conversation.tools} if conversation.tools else {})
        tokenizer = self.source.tokenizer()
        if self.template is None and not getattr(tokenizer, "chat_template", None):
            raise CalibrationError(
                f"chat messages for {self.source.name}",
                found="a tokenizer without a chat template",
                do="Give one with --chat-template FILE, or data with a field of text",
            )
        try:
            _check_parts(conversation)

            def render(messages: list[dict[str, Any]]) -> str:
                return str(tokenizer.apply_chat_template(messages, tokenize=False, **told))

            text = render(as_wanted(conversation.messages, render, conversation.where))
            # A template writes what a sequence begins with itself.
            ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]).long()
            self.check_places(ids, conversation.where)
            return ids
        except SparsifyError:
            raise
        except TemplateSyntaxError as error:
            raise CalibrationError(
                f"the chat template {self._name}",
                found=f"no Jinja template (line {error.lineno}: {first_line(error)})",
                do="Mend it, or give another with --chat-template FILE",
            ) from error
        except Exception as error:  # a template raises whatever it likes
            raise CalibrationError(
                f"data '{conversation.where}'",
                found=f"the chat template {self._name} refuses it ({type(error).__name__}: {first_line(error)})",
                do="Mend the messages, or give another template with --chat-template FILE",
            ) from error

    @property
    def _name(self) -> str:
        return f"of {self.source.name}'s tokenizer" if self.file is None else str(self.file)

    def check_places(self, ids: Tensor, where: str) -> None:
        """Where an image was to be, and is none, the model would read a token that it never saw as text.

        Raises:
            CalibrationError: ``ids`` of any shape, without images, hold the place of one.
        """
        config = self.source.config
        places = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        if any(isinstance(place, int) and bool((ids == place).any()) for place in places):
            raise CalibrationError(
                f"data '{where}'",
                found="the place of an image in the text, and no image",
                do='Name the image beside the messages ("images"), or in a part of them, or take its place out',
            )

    def check_used(self, data: object) -> None:
        """Raises:
        SpecError: a template was given, and nothing in ``data`` needed one.
        """
        if self.template is not None and not self.used:
            raise SpecError("--chat-template", found=f"no chat messages in {data}", do="Leave it out")


def _check_parts(conversation: Messages) -> None:
    parts = (p for m in conversation.messages if isinstance(m["content"], list) for p in m["content"])
    if other := next((part["type"] for part in parts if part["type"] != "text"), None):
        raise CalibrationError(
            f"data '{conversation.where}'",
            found=f"a part of type {other!r}, where text alone is read",
            do="Images in messages are for calibrating models that read images; else give text",
        )


def _read(path: Path) -> str:
    try:
        if kind_at(path) == "other":
            raise SpecError(f"chat template {path}", found="no regular file", do="Name the file of a Jinja template")
        if path.stat().st_size > MAX_TEMPLATE:
            found = f"{path.stat().st_size} bytes, more than {MAX_TEMPLATE}"
            raise SpecError(f"chat template {path}", found=found, do="Name the file of a Jinja template")
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise SpecError(f"chat template {path}", found="nothing in it", do="Name the file of a Jinja template")
        return text
    except (OSError, ValueError) as error:
        found = f"cannot be read ({first_line(error)})"
        raise SpecError(f"chat template {path}", found=found, do="Name the file of a Jinja template") from error
