"""The card of the model that an output was made of: set aside, and read for what holds of the output too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.words import plain

CARD, DENSE = "README.md", "README.dense.md"
# What is as true of the pruned model: its licence, its languages, what it is for.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
# A header is some lines; YAML is slow to read.
_HEADER, _WORD, _WORDS = 1 << 16, 300, 200


def set_aside(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Make room for a card of ``folder``: another model's goes to a name of its own, one of ours goes.

    Args:
        manifest: of which ``card`` says that the one that is there was written by us, for an earlier state.

    Returns:
        The name of the dense model's card, where there is one.
    """
    before, card = manifest.get("card"), folder / CARD
    if before is not None:
        card.unlink(missing_ok=True)
        name = before.get("dense")
        known = isinstance(name, str) and Path(name).name == name and (folder / name).is_file()
        return name if known else None
    if not card.exists():
        return None
    number, name = 1, DENSE
    while (folder / name).exists():
        number += 1
        name = f"README.dense-{number}.md"
    card.rename(folder / name)
    return name if (folder / name).is_file() else None


def kept_header(card: Path) -> dict[str, Any]:
    """Of the header of ``card`` what its outputs have too; nothing of one that is no YAML."""
    import yaml

    with card.open("rb") as file:
        text = file.read(_HEADER).decode("utf-8-sig", "replace")
    found = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, flags=re.S | re.M)
    if found is None:
        return {}
    try:
        # Every value as the text that it is: Norwegian ("no") is no language to those who read it as false.
        said = yaml.load(found[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    return {key: said[key] for key in _KEPT if _is_word(said.get(key)) or _are_words(said.get(key))}


def _is_word(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _WORD and plain(value) == value


def _are_words(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _WORDS and all(map(_is_word, value))
