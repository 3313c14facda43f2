"""What two models differ in: tensor by tensor, by kind and by block, and what their folders say of themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsify.comparing.tensors import Overlap, total
from sparsify.provenance.figures import Figure
from sparsify.provenance.places import place_of
from sparsify.words import plain

# A weight with a smaller share of zeros is called dense.
DENSE = 0.01


@dataclass(frozen=True)
class TensorDifference:
    """One name.

    Attributes:
        shape_a, shape_b: None where that model has no such tensor. dtype_a, dtype_b: empty there.
        zeros_a, zeros_b: how many numbers are zero; None of what holds no floating-point numbers.
        same: to the bit. overlap: None where shapes differ, or there are no floating-point numbers.
    """

    name: str
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    dtype_a: str = ""
    dtype_b: str = ""
    zeros_a: int | None = None
    zeros_b: int | None = None
    same: bool = False
    overlap: Overlap | None = None

    @property
    def block(self) -> str:
        """``model.layers.3``; empty outside of blocks."""
        stack, block, _ = place_of(self.name)
        return f"{stack}.{block}".strip(".")

    @property
    def kind(self) -> str:
        """``self_attn.q_proj``, the same in every block."""
        return place_of(self.name)[2].removesuffix(".weight")

    @property
    def share_a(self) -> float | None:
        """The share of zeros in A; None where it has no such numbers."""
        return _share(self.zeros_a, self.shape_a)

    @property
    def share_b(self) -> float | None:
        return _share(self.zeros_b, self.shape_b)


@dataclass(frozen=True)
class Group:
    """Tensors taken together. ``numbers`` and ``zeros`` are of each model's own, also of tensors whose shapes differ;
    ``overlap`` is over those that could be compared; ``same`` of the ``tensors`` are so to the bit."""

    name: str
    tensors: int
    same: int
    numbers_a: int
    numbers_b: int
    zeros_a: int
    zeros_b: int
    overlap: Overlap

    @property
    def plain(self) -> bool:
        """Whether there is nothing to tell of them: all the same, and not one zero."""
        return self.same == self.tensors and not self.zeros_a

    @property
    def share_a(self) -> float | None:
        return self.zeros_a / self.numbers_a if self.numbers_a else None

    @property
    def share_b(self) -> float | None:
        return self.zeros_b / self.numbers_b if self.numbers_b else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {key: value for key, value in asdict(self).items() if key != "overlap"}
        return {**own, "share_a": self.share_a, "share_b": self.share_b, **_overlap_as_dict(self.overlap)}


@dataclass(frozen=True)
class Change:
    """What two folders say differently: a key of a config, an option; None where one says nothing."""

    what: str
    a: Any
    b: Any


@dataclass(frozen=True, repr=False)
class Difference:
    """Two models.

    Attributes:
        a, b: as the user wrote them. one_folder: whether both are one place. tensors: every name, in A's order.
        config, recipe: what config.json and the last step's passes and data say otherwise.
        part: whether names were given, so that other tensors were not looked at.
        files_a, files_b: names of files that one folder alone has.
        shared_steps: how many steps of both histories are the same, from the first on; steps_a, steps_b: the rest.
        figures_a, figures_b: perplexities that each knows.
    """

    a: str
    b: str
    one_folder: bool
    tensors: Sequence[TensorDifference]
    part: bool = False
    config: Sequence[Change] = ()
    recipe: Sequence[Change] = ()
    files_a: Sequence[str] = ()
    files_b: Sequence[str] = ()
    shared_steps: int = 0
    steps_a: Sequence[Mapping[str, Any]] = ()
    steps_b: Sequence[Mapping[str, Any]] = ()
    figures_a: Sequence[Figure] = ()
    figures_b: Sequence[Figure] = ()

    @property
    def same(self) -> bool:
        """Whether every tensor is the same to the bit, and the configs say the same."""
        return not self.config and all(tensor.same for tensor in self.tensors)

    @property
    def verdict(self) -> str:
        """In a sentence."""
        every, differ = len(self.tensors), sum(not tensor.same for tensor in self.tensors)
        where = "one folder: " if self.one_folder else ""
        if differ:
            return f"{where}{differ:,} of {every:,} tensors differ"
        rest = ", and so is config.json" if not self.config else "; config.json differs"
        return f"{where}all {every:,} tensors are the same to the bit{rest}"

    def __repr__(self) -> str:
        return plain(f"<Difference {self.a}, {self.b}: {self.verdict}>")

    @property
    def whole(self) -> Group:
        """Every tensor of floating-point numbers."""
        name = "all of these" if self.part else "whole model"
        every = self.grouped(lambda tensor: name)
        return every[0] if every else Group(name, 0, 0, 0, 0, 0, 0, Overlap())

    @property
    def kinds(self) -> list[Group]:
        """Weights of one kind, over all blocks."""
        return self.grouped(lambda tensor: tensor.kind)

    @property
    def blocks(self) -> list[Group]:
        return self.grouped(lambda tensor: tensor.block or "outside the blocks")

    def grouped(self, name_of: Callable[[TensorDifference], str]) -> list[Group]:
        """Tensors of floating-point numbers by what ``name_of`` calls them."""
        groups: dict[str, list[TensorDifference]] = {}
        for tensor in self.tensors:
            if tensor.zeros_a is not None or tensor.zeros_b is not None:
                groups.setdefault(name_of(tensor), []).append(tensor)
        return [
            Group(
                name,
                len(own),
                sum(t.same for t in own),
                sum(math.prod(t.shape_a) for t in own if t.shape_a is not None),
                sum(math.prod(t.shape_b) for t in own if t.shape_b is not None),
                sum(t.zeros_a or 0 for t in own),
                sum(t.zeros_b or 0 for t in own),
                total(t.overlap for t in own if t.overlap is not None),
            )
            for name, own in groups.items()
        ]

    @property
    def only_a(self) -> list[str]:
        return [tensor.name for tensor in self.tensors if tensor.shape_b is None]

    @property
    def only_b(self) -> list[str]:
        return [tensor.name for tensor in self.tensors if tensor.shape_a is None]

    @property
    def reshaped(self) -> list[TensorDifference]:
        """Tensors whose shapes differ, whose numbers are not held against each other."""
        return [t for t in self.tensors if None not in (t.shape_a, t.shape_b) and t.shape_a != t.shape_b]

    @property
    def dense_in_a(self) -> list[str]:
        """Weights with hardly a zero in A and with zeros in B."""
        return [t.name for t in self.tensors if _dense(t.share_a, t) and t.share_b is not None and t.share_b >= DENSE]

    @property
    def dense_in_b(self) -> list[str]:
        return [t.name for t in self.tensors if _dense(t.share_b, t) and t.share_a is not None and t.share_a >= DENSE]

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        groups = {"kinds": self.kinds, "blocks": self.blocks}
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "verdict": self.verdict,
            "one_folder": self.one_folder,
            "whole": self.whole.as_dict(),
            **{name: [group.as_dict() for group in own] for name, own in groups.items()},
            "tensors": [_tensor_as_dict(tensor) for tensor in self.tensors],
            "only_in_a": self.only_a,
            "only_in_b": self.only_b,
            "shapes_differ": [tensor.name for tensor in self.reshaped],
            "dense_in_a": self.dense_in_a,
            "dense_in_b": self.dense_in_b,
            "files_only_in_a": list(self.files_a),
            "files_only_in_b": list(self.files_b),
            "config": [vars(change) for change in self.config],
            "recipe": [vars(change) for change in self.recipe],
            "shared_steps": self.shared_steps,
            "steps_a": list(self.steps_a),
            "steps_b": list(self.steps_b),
            "figures_a": [figure.as_dict() for figure in self.figures_a],
            "figures_b": [figure.as_dict() for figure in self.figures_b],
        }


def _share(zeros: int | None, shape: tuple[int, ...] | None) -> float | None:
    return None if zeros is None or shape is None or not math.prod(shape) else zeros / math.prod(shape)


def _dense(share: float | None, tensor: TensorDifference) -> bool:
    return share is not None and share < DENSE and len(tensor.shape_a or tensor.shape_b or ()) > 1


def _overlap_as_dict(overlap: Overlap) -> dict[str, Any]:
    return {
        "compared": overlap.numbers,
        "zeros_both": overlap.zeros_both,
        "zeros_shared": overlap.zeros_shared,
        "kept_jaccard": overlap.kept_jaccard,
        "relative_move": overlap.relative_move,
    }


def _tensor_as_dict(tensor: TensorDifference) -> dict[str, Any]:
    own = {key: value for key, value in vars(tensor).items() if key != "overlap"}
    return own if tensor.overlap is None else {**own, **_overlap_as_dict(tensor.overlap)}
