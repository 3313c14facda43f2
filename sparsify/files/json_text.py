"""JSON that may come from anywhere, read within bounds: files by :mod:`.reading`, lines of data here."""

from __future__ import annotations

import json
from typing import Any

# Configs are nested five or six deep; whatever reads or writes them recursively gives up at some hundreds.
MAX_DEPTH = 64


def parse_json(text: str | bytes) -> Any:
    """What ``text`` says.

    NaN and Infinity are read as Python writes them: configs of published models hold them.

    Raises:
        ValueError: no JSON, no UTF-8, nested deeper than ``MAX_DEPTH``, or text that no file can hold (half a
            character, as in ``"\\ud800"``). The message says which.
    """
    try:
        content = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) or "digits" not in str(error):
            raise
        raise ValueError("a number of too many digits") from error
    except RecursionError as error:
        raise ValueError(f"lists or tables nested more than {MAX_DEPTH} deep") from error
    _check(content)
    return content


def _check(content: Any) -> None:
    todo = [(content, 1)]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, str):
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"half a character (\\u{ord(value[error.start]):04x}) in a text") from error
        elif isinstance(value, (dict, list)):
            if depth > MAX_DEPTH:
                raise ValueError(f"lists or tables nested more than {MAX_DEPTH} deep")
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            todo += [(item, depth + 1) for item in inner if isinstance(item, (str, dict, list))]
