"""The form in which a chat template wants content: text, or a list of parts with a type each.

A template that walks over parts finds none in a text, and one that writes text may take the first of several parts
alone: neither says so. Which form holds all text is seen by rendering it with a mark behind each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from sparsify.errors import CalibrationError

Rendering = Callable[[list[dict[str, Any]]], str]

# Whoever prints a list of parts as it is, rather than their texts, puts the text into quotes.
_QUOTES = ("'", '"')


def as_wanted(
    messages: Sequence[dict[str, Any]], render: Rendering, where: str, *, parts: bool = False
) -> list[dict[str, Any]]:
    """``messages`` with their content as text or as parts, whichever ``render`` writes all of.

    Args:
        render: the template; it is called with marks in the text, once for each form that is tried.
        where: what the messages are called in errors.
        parts: whether parts are tried first. A message with images has parts in any case.

    Raises:
        CalibrationError: text of which nothing is written, in either form. What ``render`` raises in both.
    """
    forms = [[_formed(message, kind) for message in messages] for kind in (parts, not parts)]
    refused: Exception | None = None
    rendered: list[tuple[int, list[int]]] = []
    for number, form in enumerate(forms):
        try:
            lost = _lost(form, render)
        except Exception as error:  # a template raises whatever it likes at the form that it does not want
            refused = refused or error
            continue
        if not lost:
            return form
        rendered.append((number, lost))
    if refused is not None and not rendered:
        raise refused
    number, lost = min(rendered, key=lambda found: len(found[1]))
    # Some want text of one role, and parts of another.
    mixed = [forms[number ^ (at in lost)][at] for at in range(len(messages))]
    with suppress(Exception):  # (then what is lost in a form that it takes is said)
        lost = min(lost, _lost(mixed, render), key=len)
    if not lost:
        return mixed
    raise CalibrationError(
        f"data '{where}, message {lost[0] + 1}'",
        found=f"text (role {messages[lost[0]]['role']}) that the chat template leaves out, or a part of it",
        do="Give another template with --chat-template FILE, or take the text out",
    )


def _formed(message: dict[str, Any], parts: bool) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]} if parts else message
    if not isinstance(content, list):
        return message
    if not parts and all(part["type"] == "text" for part in content):
        return {**message, "content": "".join(map(_text, content))}
    # Tables of parquet files have every field that any of them has.
    whole = [{name: held for name, held in part.items() if held is not None} for part in content]
    return {**message, "content": [part | {"text": _text(part)} if part["type"] == "text" else part for part in whole]}


def _text(part: dict[str, Any]) -> str:
    text = part.get("text")
    return "" if text is None else str(text)


def _lost(messages: Sequence[dict[str, Any]], render: Rendering) -> list[int]:
    """The numbers of those of whose text, or of one of whose parts, nothing is in what is rendered."""
    marks: list[tuple[int, str, bool]] = []

    def marked(text: str, number: int, part: bool) -> str:
        if not text.strip():
            return text
        marks.append((number, f"⟦sparsify:{len(marks)}⟧", part))
        return text + marks[-1][1]

    tried = []
    for number, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, str):
            content = marked(content, number, False)
        elif isinstance(content, list):
            content = [
                part | {"text": marked(part["text"], number, True)} if part["type"] == "text" else part
                for part in content
            ]
        tried.append({**message, "content": content})
    text = render(tried)
    found = []
    for number, mark, part in marks:
        at = text.find(mark)
        if (at < 0 or (part and text[at + len(mark) :].startswith(_QUOTES))) and number not in found:
            found.append(number)
    return found
