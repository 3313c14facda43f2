"""Whole blocks taken out of a model: the least important go, the others move up, and config.json counts fewer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsify.analysis.linear import find_sites
from sparsify.errors import BackendError, SpecError
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.method.structural_pass import StructuralPass
from sparsify.structure.config import Widths

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class Stack:
    """The repeated blocks of a model: ``container`` holds them under the numbers 0 … count − 1."""

    container: str
    count: int

    def block(self, number: int) -> str:
        return f"{self.container}.{number}"

    def number(self, parameter: str) -> int | None:
        """Which block a parameter is in."""
        if not parameter.startswith(f"{self.container}."):
            return None
        part = parameter[len(self.container) + 1 :].partition(".")[0]
        return int(part) if part.isdigit() else None


def stack_of(program: Program) -> Stack:
    """The one stack of blocks that a model has.

    Raises:
        SpecError: none, or several.
    """
    blocks = dict.fromkeys(site.block for site in find_sites(program)[0] if site.block is not None)
    containers = dict.fromkeys(block.rpartition(".")[0] for block in blocks)
    if len(containers) != 1:
        raise SpecError(
            "granularity=layer",
            found=f"{len(containers)} stacks of blocks ({', '.join(containers) or 'none'})",
            do="Take granularity=block",
        )
    (container,) = containers
    return Stack(container, max(int(b.rpartition(".")[2]) for b in blocks) + 1)


def count_removed(stack: Stack, structural_pass: StructuralPass) -> int:
    """How many blocks go.

    Raises:
        SpecError: none would, or more than may.
    """
    share = getattr(structural_pass.pattern, "sparsity", 0)
    gone, free = round(stack.count * share), stack.count - structural_pass.keep_first - structural_pass.keep_last
    if not 0 < gone < stack.count or gone > free:
        raise SpecError(
            f"{structural_pass.name}:{structural_pass.pattern},granularity=layer",
            found=f"{gone} of {stack.count} blocks would go, of which {max(0, free)} may",
            do="Ask for another share, or keep fewer",
        )
    return gone


def least_important(stack: Stack, structural_pass: StructuralPass, scores: Sequence[float]) -> list[int]:
    """The numbers of the blocks that go, by one score for each."""
    may = range(structural_pass.keep_first, stack.count - structural_pass.keep_last)
    return sorted(sorted(may, key=lambda i: (scores[i], i))[: count_removed(stack, structural_pass)])


def config_without(source: Source, stack: Stack, gone: Sequence[int]) -> dict[str, Any]:
    """The fields that count blocks, and the lists with an entry for each.

    Raises:
        BackendError: no field of the config counts them.
    """
    widths = Widths(source)
    kept = [i for i in range(stack.count) if i not in set(gone)]
    lists = {
        k: [v[i] for i in kept]
        for k, v in widths.text.to_dict().items()
        if isinstance(v, list) and len(v) == stack.count
    }
    for field in _COUNTS:
        if widths.held.get(field) == stack.count:
            changes = {field: len(kept), **lists}
            model = widths.build(changes)
            if model is not None:
                numbers = {stack.number(name) for name, _ in model.named_parameters()} - {None}
                if numbers == set(range(len(kept))):
                    return changes
    raise BackendError(
        "writing the smaller model",
        found=f"no field of its config that counts its {stack.count} blocks",
        do="Take granularity=block",
    )


def tensors_kept(weights: Weights, stack: Stack, gone: Sequence[int]) -> dict[str, str]:
    """The checkpoint's tensors that stay, and their new names: block 5 becomes block 4 where one before it goes.

    Raises:
        BackendError: blocks of different kinds, of which one cannot take another's place.
    """
    kept = [i for i in range(stack.count) if i not in set(gone)]
    moved = {old: new for new, old in enumerate(kept)}
    renamed: dict[str, str] = {}
    used: set[str] = set()
    for name in weights.parameters():
        number, sources = stack.number(name), weights.sources(name)
        used |= set(sources)
        if number is None:
            names: Sequence[str] = sources
        elif number not in moved:
            continue
        else:
            place = _renumbered(name, stack, moved[number])
            if place not in weights or len(weights.sources(place)) != len(sources):
                raise BackendError(
                    "writing the smaller model",
                    found=f"blocks of different kinds: {place} is not in the model",
                    do="Take granularity=block",
                )
            names = weights.sources(place)
        renamed |= dict(zip(sources, names, strict=True))
    return renamed | {name: name for name in weights.store.names() if name not in used}


def stored_without(weights: Weights, stack: Stack, gone: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stay, under their new names, one at a time."""
    for old, new in tensors_kept(weights, stack, gone).items():
        yield new, weights.store.read(old)


def _renumbered(parameter: str, stack: Stack, number: int) -> str:
    rest = parameter[len(stack.container) + 1 :].partition(".")[2]
    return f"{stack.block(number)}.{rest}"


def removed_of(cuts: Sequence[Mapping[str, Any]]) -> tuple[Stack, list[int]] | None:
    """The blocks that a list of cuts takes out; None where it takes out channels."""
    for cut in cuts:
        if cut["kind"] == "layers":
            return Stack(str(cut["name"]), int(cut["before"])), [int(i) for i in cut["removed"]]
    return None
