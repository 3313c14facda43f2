"""Which sites a pass prunes, which it leaves dense, and why: decided before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sparsify.analysis.linear import LinearSite
from sparsify.errors import SpecError, near
from sparsify.pattern import Pattern
from sparsify.program import Program
from sparsify.weights import Weights

_NOT_NAMED = "not named by --only"


@dataclass(frozen=True)
class Target:
    """A parameter that will be pruned, with all the sites that read it.

    ``sources`` are the checkpoint tensors that may change: None for all of them, fewer where a name pattern chose
    some experts of a stack.
    """

    parameter: str
    sites: tuple[LinearSite, ...]
    sources: frozenset[str] | None = None

    @property
    def site(self) -> LinearSite:
        return self.sites[0]


@dataclass(frozen=True)
class Skipped:
    """A site that stays dense, and why."""

    name: str
    reason: str


def choose(
    program: Program,
    sites: Sequence[LinearSite],
    pattern: Pattern,
    *,
    ignore: Sequence[str] = (),
    only: Sequence[str] = (),
) -> tuple[list[Target], list[Skipped]]:
    """Split the parameters of ``sites`` into targets and skipped ones.

    By default every linear site inside a repeated block is a target, as in the papers; where a model
    has no blocks, every site is. ``only`` replaces that default, ``ignore`` takes away from either. Weights
    that an embedding shares are never targets.

    Raises:
        SpecError: a name pattern matches nothing in the model, or no target is left.
    """
    names = Names(program.weights)
    chosen, ignored = names.matching(only, "--only"), names.matching(ignore, "--ignore")
    shared = read_elsewhere(program, sites)
    blocks = any(site.block for site in sites)
    by_parameter: dict[str, list[LinearSite]] = {}
    for site in sites:
        by_parameter.setdefault(site.parameter, []).append(site)

    targets, skipped = [], []
    for parameter, own in by_parameter.items():
        site, sources = own[0], frozenset(program.weights.sources(parameter))
        wanted = (sources & chosen if only else sources) - ignored
        reason = None
        if parameter in shared:
            reason = f"shared with {shared[parameter]}: pruning it would change that too"
        elif only and not sources & chosen:
            reason = _NOT_NAMED
        elif not wanted:
            reason = "named by --ignore"
        elif not only and blocks and site.block is None:
            reason = "outside the repeated blocks (head or projection); name it with --only to prune it"
        elif not only and site.window is not None:
            reason = "a convolution with a kernel; name it with --only to prune it"
        elif not only and site.router:
            reason = "a router, which chooses experts; name it with --only to prune it"
        else:
            reason = pattern.unfit(site.shape[1])
        if reason:
            skipped.append(Skipped(site.name, reason))
        else:
            targets.append(Target(parameter, tuple(own), None if wanted == sources else wanted))
    if not targets:
        # What was asked for first: a model has many sites that were not.
        skipped.sort(key=lambda s: s.reason == _NOT_NAMED)
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3]) or "the model has no linear site"
        raise SpecError(f"pruning to {pattern}", found=f"nothing to prune ({reasons})", do="See sparsify inspect")
    return targets, skipped


class Names:
    """Every name by which a user may call a parameter: its own, its checkpoint tensors', their modules'."""

    def __init__(self, weights: Weights) -> None:
        self._of: dict[str, set[str]] = {}
        ties: dict[str, list[str]] = {}
        for alias, parameter in weights.aliases.items():
            ties.setdefault(parameter, []).append(alias)
        for parameter in weights.parameters():
            for source in weights.sources(parameter):
                for name in (source, parameter, *ties.get(parameter, ())):
                    for prefix in _prefixes(name):
                        self._of.setdefault(prefix, set()).add(source)

    def matching(self, patterns: Iterable[str], flag: str) -> frozenset[str]:
        """Checkpoint tensors that any of ``patterns`` names.

        Raises:
            SpecError: one of them matches nothing, or is no regular expression.
        """
        found: set[str] = set()
        for pattern in patterns:
            hits = [name for name in self._of if _matches(pattern, name, flag)]
            if not hits:
                tail = pattern.removeprefix("re:").strip("*")
                inside = sorted(n for n in self._of if tail and tail in n)[:4]
                parts = {f"*.{part}" for n in self._of for part in n.split(".") if not part.isdigit()}
                hint = near(pattern, {*self._of, *parts})
                if inside:
                    hint = f"Names that contain it: {', '.join(inside)}"
                raise SpecError(
                    f"{flag} {pattern}",
                    found="it matches no parameter or module of this model",
                    do=f"Write a full name, a glob (*{tail}*) or re:…. {hint}",
                )
            for name in hits:
                found |= self._of[name]
        return frozenset(found)


def _prefixes(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _matches(pattern: str, name: str, flag: str) -> bool:
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


def read_elsewhere(program: Program, sites: Sequence[LinearSite]) -> dict[str, str]:
    """Parameters that something other than a linear site reads, with what it is."""
    own = {site.parameter for site in sites}
    found = {}
    for node in program.graph.nodes:
        name = program.parameter(node)
        if name is None or program.weights.canonical(name) not in own:
            continue
        for user in node.users:
            if "embedding" in str(user.target):
                found[program.weights.canonical(name)] = "the embedding"
    return found
