"""From a setting (a share for each part) to a pass, its targets, and the words that prune so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from sparsify.errors import SpecError
from sparsify.method.base import Pass
from sparsify.method.pattern import Unstructured, shares_text
from sparsify.method.spec import find_pass, has_pattern, parse_pass, spec_text, with_pattern
from sparsify.method.weight_pass import WeightPass
from sparsify.prune.targets import Target
from sparsify.searching.parts import Part, ignoring, kinds_of, short_names
from sparsify.searching.strategy.rounds import GRID


def one_spec(method: object) -> str:
    """What Python gives for the one pass of a search or a measurement, as its spec: that, a pass, or a list of one.

    Raises:
        SpecError: something else, or several.
    """
    several = [method] if isinstance(method, str | Pass) else list(method) if isinstance(method, Sequence) else []
    if len(several) != 1 or not isinstance(several[0], str | Pass):
        found = f"{len(several)} passes" if several else f"{type(method).__name__}, no pass"
        raise SpecError(f"pass {method!r}", found=found, do='Give one: "twin", "wanda:2:4", or a pass: Wanda(NM(2, 4))')
    return several[0] if isinstance(several[0], str) else spec_text(several[0])


def pruning_pass(text: str, doing: str, pattern: str | None = None) -> WeightPass:
    """The pass that ``text`` spells, which prunes weight by weight; with ``pattern`` where it has none.

    Raises:
        SpecError: another kind of pass (``doing`` says what it was asked for), or as :func:`parse_pass`.
    """
    kind = find_pass(re.split("[:,]", text)[0].strip())
    # Before its pattern is asked for, which other kinds have not.
    if not issubclass(kind, WeightPass):
        raise SpecError(
            f"{doing} {kind.name}",
            found="a pass that does not prune weight by weight",
            do="Take one that does: twin, wanda, sparsegpt, …; see sparsify passes",
        )
    if pattern is None and not has_pattern(text):
        do = f"Write {with_pattern(text, '2:4')} or {with_pattern(text, '50%')}, say"
        raise SpecError(f"{doing} '{text}'", found="no pattern", do=do)
    own = parse_pass(text if pattern is None else with_pattern(text, pattern))
    assert isinstance(own, WeightPass)
    return own


@dataclass(frozen=True)
class Setting:
    """What one trial prunes.

    Attributes:
        own: the pass. targets: what it prunes. ignore: patterns of --ignore that leave exactly the others dense.
    """

    own: WeightPass
    targets: tuple[Target, ...]
    ignore: tuple[str, ...]

    @property
    def spec(self) -> str:
        return spec_text(self.own)


@dataclass(frozen=True)
class ByKind:
    """Percentages: each kind of layer has a level of its own, in 1/:data:`GRID`."""

    own: WeightPass
    targets: Sequence[Target]

    @property
    def kinds(self) -> dict[str, list[Target]]:
        return kinds_of(self.targets)

    def shares(self, levels: Mapping[str, int]) -> dict[str, float]:
        return {kind: level / GRID for kind, level in levels.items()}

    def setting(self, levels: Mapping[str, int]) -> Setting:
        """The pattern is the percentage of most kinds of site; the option ``kinds`` has the others'."""
        short = short_names({target.site.kind for target in self.targets})
        level_of = {target.parameter: levels[kind] for kind, members in self.kinds.items() for target in members}
        pruned = [target for target in self.targets if level_of[target.parameter]]
        of_site = {short[target.site.kind]: level_of[target.parameter] for target in pruned}
        if not pruned:
            return Setting(self.own, (), ())
        usual = Counter(of_site.values()).most_common(1)[0][0]
        patterns = {level: Unstructured(Fraction(level, GRID)) for level in of_site.values()}
        others = shares_text({name: patterns[level] for name, level in of_site.items() if level != usual})
        dense = [target for target in self.targets if not level_of[target.parameter]]
        own = replace(self.own, pattern=patterns[usual], kinds=others)
        return Setting(own, tuple(pruned), tuple(ignoring(dense, pruned)))


@dataclass(frozen=True)
class ByPart:
    """A pattern that is given: each part is pruned to it or stays dense."""

    own: WeightPass
    parts: Sequence[Part]

    def shares(self, levels: Mapping[str, int]) -> dict[str, float]:
        share = float(self.own.pattern.sparsity)
        return {part.name: share * levels[part.name] for part in self.parts}

    def setting(self, levels: Mapping[str, int]) -> Setting:
        pruned = [target for part in self.parts if levels[part.name] for target in part.targets]
        dense = [target for part in self.parts if not levels[part.name] for target in part.targets]
        return Setting(self.own, tuple(pruned), tuple(ignoring(dense, pruned)))
