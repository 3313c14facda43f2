"""``--print-after PASS``: the graph once a pass has run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsify.cli.terminal import say
from sparsify.errors import SpecError

if TYPE_CHECKING:
    from sparsify.ir.program import Program
    from sparsify.method.base import Pass

ALL = "all"


class GraphPrinter:
    """Looks on at a compile and prints the program after the passes ``names``.

    Args:
        passes: those that will run.

    Raises:
        SpecError: a name that is none of them.
    """

    def __init__(self, names: Sequence[str], passes: Sequence[str]) -> None:
        for name in names:
            if name != ALL and name not in passes:
                raise SpecError(
                    f"--print-after {name}",
                    found=f"no such pass in this command ({', '.join(passes) or 'it has none'})",
                    do=f"Name one of them, or `{ALL}`",
                )
        self.names = set(names)

    def after(self, own: Pass, program: Program) -> None:
        if ALL in self.names or own.name in self.names:
            from sparsify.inspection.graph import graph_text

            say(f"# after {own.name}\n{graph_text(program)}", lines=True)
