"""What a compile hands down: the device, the memory, the seed, and who is told what happens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from sparsify.words import check_seed
from sparsify.world.world import ALONE, World


@dataclass
class SiteResult:
    """What happened at one site.

    Attributes:
        kept: fraction of weights that are not zero. ``error``: ‖XWᵀ−XŴᵀ‖/‖XWᵀ‖ over the calibration tokens, None
            where nothing was measured; of a pass fitted to the dense model ‖X₀Wᵀ−XŴᵀ‖/‖X₀Wᵀ‖, X₀ the
            dense model's input.
        ``without_data``: experts that no token reached. ``notes``: what a pass had to do that a user should know.
        ``written``: the parameters that changed, the bias among them where the pass changed that too.
    """

    name: str
    kind: str
    parameter: str
    shape: tuple[int, ...]
    pattern: str
    kept: float
    error: float | None
    seconds: float
    tokens: int
    sources: list[str]
    without_data: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)


@dataclass
class RegionResult:
    """What became of one region that was trained.

    Attributes:
        loss: what it was judged by: ``error``, mean ‖f−T‖²/‖T‖² of its output against the dense model's, or ``kl``,
            the divergence of the predictions; ``before`` and ``after`` on held-back sequences, as written.
        rate: the rate that was best; None where nothing gained and the region stayed as it was.
        entries: how many numbers were trained. ``written``: the parameters that changed.
    """

    name: str
    loss: str
    before: float
    after: float
    rate: float | None
    entries: int
    written: list[str]
    seconds: float


@dataclass
class ChannelResult:
    """What became of one group of channels that may change places.

    Attributes:
        name: the sites that read them. ``channels``: how many, in ``lanes`` that they do not leave (heads, experts).
        moved: how many lie elsewhere now.
        before, after: what the pattern keeps of the worth of all weights that read them, as a share.
        written: the parameters that changed.
    """

    name: str
    channels: int
    lanes: int
    moved: int
    before: float
    after: float
    written: list[str]
    seconds: float


@dataclass(frozen=True)
class Progress:
    """What an observer is told: how far a phase is. Phases follow each other, and some come again.

    Attributes:
        phase: what is being done, in a word or two: ``loading``, ``sampling``, ``tracing``, ``pruning``, ….
        done, total: so many of how many; a fraction of one that is under way. ``total`` None: nobody knows how many.
        unit: what things are called that are done one after the other (``layer``); "" for what is only counted.
        what: what it is being done to: a name.
        tokens: those that run through the whole model in this phase; 0 where none do.
        site: what happened at a site that has just been pruned.
    """

    phase: str
    done: float = 0
    total: float | None = None
    what: str = ""
    unit: str = ""
    tokens: int = 0
    site: SiteResult | None = None

    @property
    def share(self) -> float | None:
        """How much of the phase is done, from 0 to 1; None where nobody knows."""
        return None if self.total is None else min(1.0, self.done / max(self.total, 1e-9))

    @property
    def count(self) -> str:
        """``7/128``, or ``layer 3/32`` for the one that is under way; "" where nobody knows."""
        if self.total is None:
            return ""
        at = min(int(self.done) + 1, int(self.total)) if self.unit else int(self.done)
        return f"{self.unit} {at}/{int(self.total)}".lstrip()


Observer = Callable[[Progress], None]


def unobserved(progress: Progress) -> None:
    """The observer that is told and says nothing."""


_observer: ContextVar[Observer] = ContextVar("observer", default=unobserved)


@contextmanager
def observed(observe: Observer | None) -> Iterator[None]:
    """Whoever is told of what happens inside; None: whoever is told already."""
    token = _observer.set(observe or _observer.get())
    try:
        yield
    finally:
        _observer.reset(token)


def report(progress: Progress) -> None:
    """Tell the observer. It is at hand everywhere: backends, stores and files have no :class:`Context`."""
    _observer.get()(progress)


Item = TypeVar("Item")


def counted(phase: str, items: Collection[Item], *, unit: str = "", what: str | None = None) -> Iterator[Item]:
    """``items`` one after the other, each told of.

    Args:
        what: what the phase is about; None: the item's own name.
    """
    for number, item in enumerate(items):
        report(Progress(phase, number, len(items), str(item) if what is None else what, unit))
        yield item
    report(Progress(phase, len(items), len(items), what or "", unit))


@dataclass(frozen=True)
class Context:
    """Made once and handed down; nothing else says where and within what a compile runs.

    Attributes:
        device: where regions run and weights are pruned. memory: bytes of activations that are kept there, while a
            quarter of a GPU's free memory holds them, or in memory; more are spilled to a file. seed: of everything
            that is drawn. observe: who is told: whoever :func:`observed` says.
        world: the processes that share the work.

    Raises:
        SpecError: no seed.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory: int = 8 << 30
    seed: int = 0
    observe: Observer = report
    world: World = ALONE

    def __post_init__(self) -> None:
        check_seed(self.seed)
