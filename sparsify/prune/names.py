"""What ``--only`` and ``--ignore`` name, resolved once into checkpoint tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from sparsify.errors import SpecError, near
from sparsify.ir.weights import Weights


@dataclass(frozen=True)
class Named:
    """What a user names: patterns of parameters and modules."""

    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """Which checkpoint tensors may be pruned: all but ``ignored``, or of ``only`` where that is not None.

    Attributes:
        passes: of passes with names of their own, by their place among all passes.
    """

    only: frozenset[str] | None = None
    ignored: frozenset[str] = frozenset()
    passes: Mapping[int, Wanted] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: Weights, only: Sequence[str] = (), ignore: Sequence[str] = ()) -> Wanted:
        """What the patterns name in a model.

        Raises:
            SpecError: one of them matches nothing, or is no regular expression.
        """
        if not only and not ignore:
            return cls()
        names = _Names(weights)
        return cls(names.matching(only, "--only") if only else None, names.matching(ignore, "--ignore"))

    @classmethod
    def of_each(cls, weights: Weights, every: Named, each: Sequence[Named]) -> Wanted:
        """What ``every`` pass may prune; and ``each`` by its place, where it has names of its own: its ``only`` stands
        for that of all, its ``ignore`` comes to that of all.

        Raises:
            SpecError: as :meth:`of`.
        """
        whole = cls.of(weights, every.only, every.ignore)
        own = {
            place: cls.of(weights, named.only or every.only, (*every.ignore, *named.ignore))
            for place, named in enumerate(each)
            if named.only or named.ignore
        }
        return replace(whole, passes=own)

    def of_pass(self, place: int) -> Wanted:
        """What the pass at that place may prune."""
        return self.passes.get(place, self)

    def renamed(self, names: Mapping[str, str | None]) -> Wanted:
        """The same tensors in a model in which they have new names.

        Args:
            names: the new name of each, None for one that is gone; what is not among them kept its own.
        """

        def follow(tensors: frozenset[str]) -> frozenset[str]:
            moved = (names.get(name, name) for name in tensors)
            return frozenset(name for name in moved if name is not None)

        passes = {place: own.renamed(names) for place, own in self.passes.items()}
        return Wanted(None if self.only is None else follow(self.only), follow(self.ignored), passes)


class _Names:
    """Every name by which a user may call a parameter: its own, its checkpoint tensors', their modules'."""

    def __init__(self, weights: Weights) -> None:
        self._of: dict[str, set[str]] = {}
        ties: dict[str, list[str]] = {}
        for alias, parameter in weights.aliases.items():
            ties.setdefault(parameter, []).append(alias)
        for parameter in weights.parameters():
            for source in weights.sources(parameter):
                for name in (source, parameter, *ties.get(parameter, ())):
                    for prefix in prefixes(name):
                        self._of.setdefault(prefix, set()).add(source)

    def matching(self, patterns: Iterable[str], flag: str) -> frozenset[str]:
        """Checkpoint tensors that any of ``patterns`` names; see :func:`named`."""
        return named(self._of, patterns, flag)


def named(of: Mapping[str, set[str]], patterns: Iterable[str], flag: str) -> frozenset[str]:
    """What any of ``patterns`` names.

    Args:
        of: each name that may be given, and what it stands for. flag: where the patterns were given.

    Raises:
        SpecError: one of them matches nothing, or is no regular expression.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in of if matches(pattern, name, flag)]
        if not hits:
            tail = pattern.removeprefix("re:").strip("*")
            inside = sorted(n for n in of if tail and tail in n)[:4]
            parts = {f"*.{part}" for n in of for part in n.split(".") if not part.isdigit()}
            hint = near(pattern, {*of, *parts})
            if inside:
                hint = f"Names that contain it: {', '.join(inside)}"
            raise SpecError(
                f"{flag} {pattern}",
                found="it matches no parameter or module of this model",
                do=f"Write a full name, a glob (*{tail}*) or re:…. {hint}",
            )
        for name in hits:
            found |= of[name]
    return frozenset(found)


def prefixes(name: str) -> Iterable[str]:
    """``name`` and every module that it is in."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def matches(pattern: str, name: str, flag: str) -> bool:
    """Whether ``pattern`` is ``name``, as a whole name, a glob or ``re:…``; ``flag`` is where it was given.

    Raises:
        SpecError: it is no regular expression.
    """
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise SpecError(
                f"{flag} {pattern}", found=f"not a regular expression ({error})", do="Mend it, or use a glob"
            ) from error
    if any(c in pattern for c in "*?["):
        # As in a path, a glob may begin at any dot: mlp* names model.layers.0.mlp.
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return name == pattern
