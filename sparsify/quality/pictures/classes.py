"""Which of a model's classes a folder of pictures is meant for: by label, a part of it, synset or number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.errors import CalibrationError, near

_SYNSET = re.compile(r"\bn\d{8}\b")


def match_classes(names: Sequence[str], config: Any, where: str) -> tuple[dict[str, int], str | None]:
    """The class of each folder of ``names``, and a sentence where they were matched by their order alone.

    Args:
        config: with ``id2label``. where: what they lie in, for errors.

    Raises:
        CalibrationError: folders whose names are no classes of the model's, or stand for several.
    """
    labels = {int(number): str(label) for number, label in (getattr(config, "id2label", None) or {}).items()}
    known = _known(labels)
    found = {name: known.get(_plain(name)) for name in names}
    if several := next((name for name, numbers in found.items() if numbers is not None and len(numbers) > 1), None):
        numbers = sorted(found[several] or ())
        raise CalibrationError(
            f"class '{several}' in {where}",
            found=f"a name of {len(numbers)} of the model's classes, {' and '.join(map(str, numbers))}",
            do="Name the folder by its synset or by the number of its class",
        )
    unknown = [name for name, numbers in found.items() if numbers is None]
    if not unknown:
        return {name: next(iter(numbers)) for name, numbers in found.items() if numbers}, None
    if len(unknown) == len(names):
        if all(name.isascii() and name.isdigit() and int(name) in labels for name in names):
            return {name: int(name) for name in names}, None
        if len(names) == len(labels):
            note = (
                f"the folders in {where} are named by none of the model's labels ({labels[0]}, …): "
                f"they were taken for its {len(labels)} classes in the order of their names"
            )
            return {name: number for number, name in enumerate(sorted(names))}, note
    first = unknown[0]
    more = f", nor {len(unknown) - 1} more" if len(unknown) > 1 else ""
    raise CalibrationError(
        f"class '{first}' in {where}",
        found=f"none of the model's {len(labels)} labels{more}",
        do=f"Name folders by label, synset or number. {near(_plain(first), known)}",
    )


def _known(labels: Mapping[int, str]) -> dict[str, set[int]]:
    """Every name of a class with the numbers of the classes that it names: whole labels before parts of them."""
    whole: dict[str, set[int]] = {}
    parts: dict[str, set[int]] = {}
    for number, label in labels.items():
        whole.setdefault(_plain(label), set()).add(number)
        # ``tench, Tinca tinca``, and ``n01440764 tench``.
        for part in [*label.split(","), *_SYNSET.findall(label), _SYNSET.sub("", label)]:
            if _plain(part):
                parts.setdefault(_plain(part), set()).add(number)
    return parts | whole


def _plain(name: str) -> str:
    """Without case, underscores and hyphens."""
    return " ".join(re.sub(r"[_\-]", " ", name).casefold().split())
