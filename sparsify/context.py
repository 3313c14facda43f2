"""What a compile hands down: the device, the memory, the seed, and who is told what happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


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


@dataclass
class Progress:
    """What an observer is told: after a batch of a region (``site`` None), and after each site is pruned.

    ``tokens`` are those of the batch that just left a region; every token leaves every region once.
    """

    regions_done: int
    regions: int
    label: str
    tokens: int
    site: SiteResult | None = None


Observer = Callable[[Progress], None]


def unobserved(progress: Progress) -> None:
    """The observer that is told and says nothing."""


@dataclass(frozen=True)
class Context:
    """Made once and handed down; nothing else says where and within what a compile runs.

    Attributes:
        device: where regions run and weights are pruned. memory: bytes of activations that are kept there, while a
            quarter of a GPU's free memory holds them, or in memory; more are spilled to a file. seed: of everything
            that is drawn. observe: who is told.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory: int = 8 << 30
    seed: int = 0
    observe: Observer = unobserved
