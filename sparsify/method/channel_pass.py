"""What a channel pass is: mathematics that finds a better order for channels which may change places.

It knows no graph and no file; which channels may change places, what their inputs measure and writing parameters in
the new order are :mod:`sparsify.structure.reorder`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsify.errors import SpecError
from sparsify.method.base import Change, Kind, Pass
from sparsify.method.pattern import NM, Pattern


@dataclass(frozen=True)
class ChannelPass(Pass):
    """Base of passes that reorder channels inside of blocks for an N:M pattern; the model's function stays the same.

    Attributes:
        pattern: N:M, that of the pass that prunes afterwards.
    """

    pattern: Pattern

    kind: ClassVar[Kind] = "channels"
    follows: ClassVar[frozenset[Kind]] = frozenset({"structure", "graph", "channels"})
    misplaced: ClassVar[str] = "zeros whose pattern another order of channels would break"
    changes: ClassVar[frozenset[Change]] = frozenset({"weights"})

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, NM):
            raise SpecError(
                f"{self.name}:{self.pattern}",
                found="a share of zeros, which is the same in any order of channels",
                do=f"Write {self.name}:2:4, say, or leave it out",
            )

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("squared_norm",)

    @property
    def unit(self) -> int:
        """Channels of one group of the pattern, M."""
        assert isinstance(self.pattern, NM)
        return self.pattern.m

    def worth(self, weight: Tensor, squared_norm: Tensor) -> Tensor:
        """What each weight is worth keeping: [out_features, channels], none negative.

        Args:
            weight: [out_features, channels] in float32: the columns of one matrix that may change places.
            squared_norm: [channels], the mean over calibration sequences of Σ x² of each input.
        """
        raise NotImplementedError

    def kept(self, worth: Tensor) -> float:
        """What the pattern keeps of ``worth`` [channels, rows] in the order in which it lies."""
        raise NotImplementedError

    def order(self, worth: Tensor, seed: int) -> Tensor:
        """The channel that comes to each place: [channels], a permutation that keeps at least as much.

        Args:
            worth: [channels, rows], the rows of all matrices that read these channels.
            seed: another one for every lane.
        """
        raise NotImplementedError
