"""``sparsify diff``: what two models differ in, read a tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sparsify.comparing.difference import Difference, TensorDifference
from sparsify.comparing.said import changes, last_step, shared
from sparsify.comparing.side import open_side
from sparsify.comparing.tensors import overlap_of, same_bits, zeros_of
from sparsify.context import counted
from sparsify.errors import CheckpointError
from sparsify.provenance.figures import figures_of
from sparsify.provenance.places import folder_of
from sparsify.provenance.runs import earlier
from sparsify.prune.names import named, prefixes
from sparsify.words import names_given

if TYPE_CHECKING:
    from sparsify.compiler.result import Compiled


def diff(
    a: str | Path | Compiled,
    b: str | Path | Compiled,
    *,
    only: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
    check: bool = True,
    allow_bin: bool = False,
) -> Difference:
    """Hold two models against each other: folders of any form, packed ones unpacked a tensor at a time, hub ids, GGUF
    files, ONNX files or folders, and results of :func:`sparsify.compile` that were written.

    Args:
        only, ignore: names, globs or ``re:…`` of tensors or modules, which either model may have.
        check: hold every byte that is read against each folder's ``sparsify.json``. allow_bin: read pytorch_model.bin.

    Raises:
        CheckpointError: a model that cannot be read, or two that have not one tensor's name in common.
        SpecError: a name that matches nothing in either, or a result that was not written.
    """
    only, ignore = names_given(only, "only"), names_given(ignore, "ignore")
    sides = [folder_of(side, "comparing two models") for side in (a, b)]
    one, other = (open_side(side, check=check, allow_bin=allow_bin) for side in sides)
    in_a, in_b = dict.fromkeys(one.store.names()), dict.fromkeys(other.store.names())
    names = _wanted(one.name, other.name, [*in_a], [*in_b], only, ignore)
    history_a, history_b = earlier(one.manifest), earlier(other.manifest)
    both = shared(history_a, history_b)
    return Difference(
        one.name,
        other.name,
        one.path.resolve() == other.path.resolve(),
        [
            _tensor(
                name, one.store.read(name) if name in in_a else None, other.store.read(name) if name in in_b else None
            )
            for name in counted("comparing", names)
        ],
        bool(only or ignore),
        changes(one.config, other.config),
        # Of two that were made by us; what one alone says is in its history.
        changes(last_step(one.manifest), last_step(other.manifest)) if one.manifest and other.manifest else [],
        sorted(one.files - other.files),
        sorted(other.files - one.files),
        both,
        history_a[both:],
        history_b[both:],
        figures_of(one.manifest),
        figures_of(other.manifest),
    )


def _wanted(
    a: str, b: str, in_a: Sequence[str], in_b: Sequence[str], only: Sequence[str], ignore: Sequence[str]
) -> list[str]:
    """The names of both models that are compared, A's first."""
    if not {*in_a} & {*in_b}:
        raise CheckpointError(
            f"comparing {a} and {b}",
            found=f"no tensor of one name ({_some(in_a)} and {_some(in_b)})",
            do="Compare models of one architecture, in forms that keep the checkpoint's names",
        )
    of: dict[str, set[str]] = {}
    for name in (every := dict.fromkeys([*in_a, *in_b])):
        for prefix in prefixes(name):
            of.setdefault(prefix, set()).add(name)
    kept = named(of, only, "--only") if only else frozenset(every)
    left = named(of, ignore, "--ignore")
    return [name for name in every if name in kept and name not in left]


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} of them, {names[0]} first" if names else "none at all"


def _tensor(name: str, one: Tensor | None, other: Tensor | None) -> TensorDifference:
    """What becomes of one name, which A has as ``one`` and B as ``other``."""
    shape_a, shape_b = (None if tensor is None else tuple(tensor.shape) for tensor in (one, other))
    dtype_a, dtype_b = ("" if tensor is None else str(tensor.dtype).removeprefix("torch.") for tensor in (one, other))
    if one is None or other is None or one.shape != other.shape or not (_counts(one) and _counts(other)):
        zeros_a, zeros_b = (zeros_of(own) if own is not None and _counts(own) else None for own in (one, other))
        overlap = None
    else:
        overlap = overlap_of(one, other)
        zeros_a, zeros_b = overlap.zeros_a, overlap.zeros_b
    same = one is not None and other is not None and same_bits(one, other)
    return TensorDifference(name, shape_a, shape_b, dtype_a, dtype_b, zeros_a, zeros_b, same, overlap)


def _counts(tensor: Tensor) -> bool:
    """Whether its zeros say anything: those of counters and of codes do not."""
    return tensor.is_floating_point()
