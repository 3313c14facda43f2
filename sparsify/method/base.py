"""What every pass is: a frozen dataclass whose fields are its options, and what it declares of itself.

The driver knows a pass by its declarations alone: what it needs, what it changes, and what may have run before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, Literal

from sparsify.errors import SpecError

Kind = Literal["structure", "graph", "channels", "weights", "regions", "rounding", "lowering"]
Change = Literal["shapes", "weights", "graph"]


@dataclass(frozen=True)
class Pass:
    """Base of all passes.

    Class attributes:
        name: how the pass is called in a spec. ``summary``: what it does, in a line. ``when``: when to take it, and
            ``example``, a spec: for ``sparsify passes NAME``, which reads them and what the docstring says of each
            option (``Args:`` or ``Attributes:``) without importing the pass (:mod:`sparsify.method.declared`).
        kind: who runs it: ``structure`` makes the model smaller, ``graph`` sees a captured program as a whole,
            ``channels`` puts channels into another order, ``weights`` prunes one matrix after the other, ``regions``
            trains one block after the other, ``rounding`` rounds one matrix after the other, ``lowering`` rewrites the
            graph for packed operators.
        follows: kinds of passes that may have run before it; ``misplaced`` says why no other may.
        changes: what it may change of the model: the shapes of parameters, their values, the graph. Checked after
            it has run, and before: a backend that writes parameters alone takes no pass that changes the graph.
        common_to: of a base class, what the passes are called whose options it gives; they are listed once for all.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    when: ClassVar[str] = ""
    example: ClassVar[str] = ""
    kind: ClassVar[Kind]
    follows: ClassVar[frozenset[Kind]]
    misplaced: ClassVar[str]
    changes: ClassVar[frozenset[Change]]
    common_to: ClassVar[str] = ""

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics it needs (:class:`sparsify.method.statistics.InputStatistics`)."""
        return ()

    @property
    def needs_data(self) -> bool:
        """Whether it needs calibration batches."""
        return bool(self.statistics)

    @property
    def leaves(self) -> Kind:
        """The kind of pass whose work is there after it, for those that follow: more than its own where it does two
        things at once."""
        return self.kind

    @property
    def zero_points(self) -> int | None:
        """The bits of the grid with zero points on which it leaves weights; None where it leaves them on none."""
        return None

    @classmethod
    def options(cls) -> dict[str, Field[Any]]:
        """Every option that has a text form, by its name; a field with ``metadata={"text": False}`` has none."""
        return {f.name: f for f in fields(cls) if f.name != "pattern" and f.metadata.get("text", True)}

    @classmethod
    def takes_pattern(cls) -> bool:
        return any(f.name == "pattern" for f in fields(cls))

    @classmethod
    def shared_base(cls) -> type[Pass] | None:
        """The nearest base whose options are listed once for all its passes."""
        return next((base for base in cls.__mro__ if base.__dict__.get("common_to")), None)

    @classmethod
    def options_of_its_own(cls) -> dict[str, Field[Any]]:
        """Options that its shared base has not, or has with another default."""
        base = cls.shared_base()
        common = {} if base is None or base is cls else base.options()
        return {n: f for n, f in cls.options().items() if n not in common or common[n].default != f.default}


def check_order(passes: Sequence[Pass]) -> None:
    """Check each pass's declaration of what may run before it.

    Raises:
        SpecError: a pass in a place where it means nothing.
    """
    for place, later in enumerate(passes):
        for earlier in passes[:place]:
            if earlier.leaves not in later.follows:
                raise SpecError(f"{later.name} after {earlier.name}", found=later.misplaced, do=_advice(later))


def _advice(own: Pass) -> str:
    return {
        "structure": "Give structural passes first",
        "graph": "Give it before passes that round weights or lower the graph",
        "channels": "Give it before the passes that prune: --pass permute:2:4 --pass twin:2:4",
        "weights": "Give it before passes that round weights or lower the graph",
        "regions": "Give it before passes that round weights or lower the graph",
        "rounding": "Give it before passes that lower the graph",
        "lowering": "Lower once, at the end",
    }[own.kind]
