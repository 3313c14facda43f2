"""What is pruned more or less as one: the layers of a kind, or those of a kind in some blocks.

Sites that read one input are of one kind (queries, keys and values; the gate and the way up of an MLP), in whichever
block they are; which those are the graph says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sparsify.analysis.linear import group_by_input
from sparsify.method.pattern import belongs
from sparsify.prune.names import matches
from sparsify.prune.targets import Target

# What a site outside of all blocks is in.
OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class Part:
    """Some of the weights that a pass prunes.

    Attributes:
        kind: what the kind is called, ``q/k/v_proj``. blocks: the blocks that they are in.
        size: how many weights.
    """

    kind: str
    blocks: tuple[str, ...]
    targets: tuple[Target, ...]

    @property
    def name(self) -> str:
        """``o_proj``, or ``o_proj of model.layers.0…3``."""
        if len(self.blocks) == 1:
            return f"{self.kind} of {self.blocks[0]}"
        return f"{self.kind} of {self.blocks[0]}…{self.blocks[-1].rpartition('.')[2]}"

    @property
    def size(self) -> int:
        return sum(size_of(target) for target in self.targets)


def size_of(target: Target) -> int:
    """How many weights a target has."""
    return target.site.experts * target.site.shape[0] * target.site.shape[1]


def kinds_of(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """The targets by their kind's name, in the order of the model."""
    own: dict[str, str] = {}  # the kind of a site -> the first one that reads an input with it

    def first(kind: str) -> str:
        while own.setdefault(kind, kind) != kind:
            kind = own[kind]
        return kind

    for group in group_by_input([target.site for target in targets]):
        for site in group.sites:
            one, other = first(group.sites[0].kind), first(site.kind)
            own[other] = one
    members: dict[str, list[Target]] = {}
    for target in targets:
        members.setdefault(first(target.site.kind), []).append(target)
    short = short_names({target.site.kind for target in targets})
    return {_joined([short[t.site.kind] for t in found]): found for found in members.values()}


def _joined(names: Iterable[str]) -> str:
    """``q/k/v_proj`` of q_proj, k_proj and v_proj."""
    own = list(dict.fromkeys(names))
    ends = {name.rpartition("_")[1:] for name in own}
    if len(own) == 1 or len(ends) > 1 or any("." in name for name in own):
        return "/".join(own)
    end = "".join(ends.pop())
    return "/".join(name.removesuffix(end) for name in own) + end


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """The shortest end of each kind's name that calls no other of them."""
    known, found = set(kinds), {}
    for kind in known:
        words = kind.split(".")
        ends = (".".join(words[at:]) for at in range(len(words) - 1, 0, -1))
        found[kind] = next((e for e in ends if sum(belongs(one, e) for one in known) == 1), kind)
    return found


def cells(targets: Sequence[Target], most: int | None = None) -> list[Part]:
    """Kinds by block, kind after kind; at most ``most`` of a kind: neighbouring blocks stand together then."""
    found = []
    for kind, members in kinds_of(targets).items():
        by_block: dict[str, list[Target]] = {}
        for target in members:
            by_block.setdefault(target.site.block or OUTSIDE, []).append(target)
        blocks = list(by_block)
        count = min(len(blocks), most or len(blocks))
        bounds = [len(blocks) * at // count for at in range(count + 1)]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            band = tuple(blocks[start:stop])
            found.append(Part(kind, band, tuple(t for block in band for t in by_block[block])))
    return found


def ignoring(dense: Sequence[Target], pruned: Sequence[Target]) -> list[str]:
    """Few patterns of --ignore that name every one of ``dense`` and none of ``pruned``: whole kinds, blocks and modules
    before single sites."""
    kept, names = [target.parameter for target in pruned], [target.parameter for target in dense]
    short = short_names({target.site.kind for target in (*dense, *pruned)})
    ways: tuple[Callable[[Target], str], ...] = (
        lambda target: target.site.block or "",
        lambda target: f"*.{short[target.site.kind]}",
        lambda target: target.site.name.rpartition(".")[0],
        lambda target: target.site.name,
        lambda target: target.parameter,
    )
    named = {
        pattern: {name for name in names if _names(pattern, name)}
        for pattern in dict.fromkeys(way(target) for way in ways for target in dense)
        if pattern and not any(_names(pattern, name) for name in kept)
    }
    found, left, sites = list[str](), set(names), {target.site.name for target in dense}
    while left:
        # What names a single site is left to its own name, which stands for no other.
        best = max(named, key=lambda pattern: (len(named[pattern] & left), pattern in sites))
        found.append(best)
        left -= named[best]
    return found


def _names(pattern: str, name: str) -> bool:
    """Whether --ignore ``pattern`` names the parameter ``name``, itself or a module that it is in."""
    if "*" not in pattern:
        return name == pattern or name.startswith(f"{pattern}.")
    words = name.split(".")
    return any(matches(pattern, ".".join(words[: at + 1]), "--ignore") for at in range(len(words)))
