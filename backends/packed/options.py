"""What may be asked of the backend ``packed``. Imports nothing heavy: its words are refused before a model opens."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.errors import SpecError
from sparsify.runtime.words import Activations, AskedFewLayout, AskedGroup, AskedValues, CopyPolicy, PackingChoice


@dataclass(frozen=True)
class Options:
    """The options of the backend ``packed``.

    Attributes:
        layout: ``auto`` takes packed24 where a weight is 2:4 along its inputs and a bitmask elsewhere; of integers,
            ``dense`` where zeros make nothing smaller.
        choice: ``measured`` leaves a weight dense where one token through it is measured to take longer packed;
            ``smallest`` packs whatever becomes smaller.
        values: ``auto`` stores weights that a pass rounded as integers of 8 or 4 bits with scales, which give them to
            the bit; ``int8`` and ``int4`` round others to nearest first (the pass ``round`` loses less); ``full`` keeps
            their dtype.
        group: in_features that share a scale, or the whole ``row``, where values=int8 (row) or int4 (64) rounds.
        activations: of weights stored as integers: ``int8`` rounds the inputs of a product to 8 bits by token and
            group; ``float`` does not, and is slower.
        policy: what a server of batches (vLLM) keeps in memory on CPUs: ``decode`` the packed weights alone; ``both`` a
            dense copy beside each, for the numbers of tokens for which it is measured faster where it is served.
    """

    layout: AskedFewLayout = "auto"
    choice: PackingChoice = "measured"
    values: AskedValues = "auto"
    group: AskedGroup | None = None
    activations: Activations = "int8"
    policy: CopyPolicy = "decode"

    def __post_init__(self) -> None:
        if self.group is not None and self.values not in ("int8", "int4"):
            raise SpecError(
                f"packed:values={self.values},group={self.group}",
                found="in_features that share a scale, and nothing is rounded",
                do="Add values=int8 or values=int4, or leave group out: a grid is found with its own",
            )
        if self.values == "full" and (self.layout == "dense" or self.activations != "int8"):
            asked = "layout=dense" if self.layout == "dense" else f"activations={self.activations}"
            raise SpecError(
                f"packed:values=full,{asked}",
                found="an option of weights stored as integers",
                do=f"Leave {asked} out, or values=full",
            )
