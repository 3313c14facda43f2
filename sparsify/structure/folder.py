"""Write the folder of a smaller model: the source's files, a changed config, and other tensors."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.analysis.dimensions.walk import Ids
from sparsify.context import Progress, report
from sparsify.files.companions import rewrite_config
from sparsify.files.writer import lay_out, lay_out_files, layout_of
from sparsify.frontend.source import Source
from sparsify.ir.weights import Weights
from sparsify.structure.config import by_part, changed


def write_files(source: Source, weights: Weights, dense: Weights, config: Mapping[str, Any], into: Path) -> None:
    """The parameters of ``weights`` under the names that the checkpoint of ``dense`` has for them."""

    # What transformers turns round by the number of heads has fewer of them.
    smaller = changed(source.config, config)

    def stored() -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensors, those of one parameter at a time; then what the checkpoint holds beside parameters."""
        seen: set[str] = set()
        for name in dense.parameters():
            if seen.issuperset(dense.sources(name)):
                continue
            parts = {made: weights.read(made) for made in dense.made_together(name)}
            yield from dense.stored(parts, smaller).items()
            # One conversion may make fewer tensors of a smaller parameter: those that are left over go.
            seen |= set(dense.sources(name))
        for tensor in dense.store.names():
            if tensor not in seen:
                yield tensor, dense.store.read(tensor)

    write_tensors(source, stored, config, into)


def write_tensors(
    source: Source, stored: Callable[[], Iterator[tuple[str, Tensor]]], config: Mapping[str, Any], into: Path
) -> None:
    """The files of ``source`` with other tensors and a changed config."""
    assert source.folder is not None, "a model in memory was saved first"
    source.copy_beside(into)
    rewrite_config(into, lambda content: _with_widths(content, by_part(source.config, config)))
    # Twice over the tensors, and never all of them at once.
    shapes = {name: (value.dtype, list(value.shape)) for name, value in stored()}
    if source.checkpoint is None:
        out = lay_out(into, shapes)
    else:
        files = {f: {n: shapes[n] for n in held if n in shapes} for f, held in layout_of(source.checkpoint).items()}
        out = lay_out_files(into, {f: held for f, held in files.items() if held})
    for number, (name, value) in enumerate(stored()):
        report(Progress("writing the smaller model", number, len(shapes), name))
        out.write(name, value.contiguous())


def _with_widths(content: dict[str, Any], config: Mapping[tuple[str, ...], Mapping[str, Any]]) -> dict[str, Any]:
    """A config.json's content that says other widths, by where in it they are said."""
    result = copy.deepcopy(content)
    for path, fields in config.items():
        owner = result
        for name in path:
            owner = owner.setdefault(name, {})
        owner.update(fields)
    return result


def renamed_experts(weights: Weights, kept: Mapping[str, Mapping[int, Ids]]) -> dict[str, str | None]:
    """The new names of the checkpoint tensors of experts that come to stand under another number; None of those that
    are gone.

    Args:
        kept: parameter -> axis -> the positions that stay; a stack of experts has them on its first axis.
    """
    renamed: dict[str, str | None] = {}
    for name, axes in kept.items():
        conversion = weights.conversion(name)
        if conversion is None or 0 not in axes:
            continue
        place = {int(old): new for new, old in enumerate(axes[0])}
        for source, pattern in conversion.sources:
            # The one number of a converter's pattern is the expert's.
            found = re.search(pattern.replace(".*.", r".(\d+)."), source) if ".*." in pattern else None
            if found is None:
                continue
            number = place.get(int(found[1]))
            moved = None if number is None else f"{source[: found.start(1)]}{number}{source[found.end(1) :]}"
            renamed[source] = moved
    return renamed
