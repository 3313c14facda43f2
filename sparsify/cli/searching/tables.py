"""What a search and a measurement of sensitivity print."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsify.provenance.commands import command_of
from sparsify.searching.costs import MEANING, Sensitivity
from sparsify.searching.found import Found

# Parts that are shown: the dearest.
_SHOWN = 12


def search_report(found: Found) -> RenderableType:
    """What each kind of layer got, and how to prune so again."""
    table = Table(title=f"{found.model} within {found.budget}, schedule {found.schedule}", title_justify="left")
    table.add_column("kind of layer", overflow="fold")
    table.add_column("zeros", overflow="fold")
    for kind, zeros in _by_kind(found.shares).items():
        table.add_row(kind, zeros)
    table.add_section()
    table.add_row(f"all {found.weights:,} weights that can be pruned", f"{found.sparsity:.2%}")
    lines = [
        f"perplexity {found.dense:.4g} → {found.perplexity:.4g}: {found.perplexity / found.dense:.4f} times the dense "
        f"model's; the budget allows {found.limit:.4g}",
        f"{len(found.trials)} trials"
        + (f", {found.resumed} of them kept from before" if found.resumed else "")
        + f", in {found.seconds:.0f} s",
        f"judged by {found.data}",
        *([] if found.calibration is None else [f"calibrated on {found.calibration}"]),
    ]
    return Group(table, *map(Text, lines))


def _by_kind(shares: Mapping[str, float]) -> dict[str, str]:
    """What each kind of layer got, and in which blocks it stayed dense where that is told by block."""
    blocks: dict[str, dict[str, float]] = {}
    for name, share in shares.items():
        kind, _, block = name.partition(" of ")
        blocks.setdefault(kind, {})[block] = share
    found = {}
    for kind, own in blocks.items():
        dense = [block for block, share in own.items() if not share]
        zeros = f"{max(own.values()):.1%}"
        found[kind] = zeros if not dense else "dense" if len(dense) == len(own) else f"{zeros}; dense: {_listed(dense)}"
    return found


def _listed(blocks: Sequence[str]) -> str:
    """``model.layers.0, 3…5`` of model.layers.0 and model.layers.3…5."""
    first, *others = blocks
    start = first.rpartition("…")[0].rpartition(".")[0] if "…" in first else first.rpartition(".")[0]
    return ", ".join([first, *(block.removeprefix(f"{start}.") for block in others)])


def again(found: Found) -> str:
    """The command that prunes so again."""
    if found.recipe is not None and (whole := command_of({"command": "compile", "recipe": found.recipe})) is not None:
        return whole
    schedule = f" --schedule {found.schedule}" if found.schedule not in ("layer", "none") else ""
    return f"sparsify compile MODEL {shlex.join(found.words)}{schedule}"


def sensitivity_report(result: Sensitivity) -> RenderableType:
    """Totals by kind and by block, the dearest parts, and what leaving the worst dense saves."""
    kinds = _sums("kind of layer", "in all blocks", result.kinds, result.total)
    # In the order of cost, as everything here.
    blocks = dict(sorted(result.blocks.items(), key=lambda item: -item[1]))
    by_block = _sums("block", "all kinds", dict(list(blocks.items())[:_SHOWN]), result.total)
    table = Table(title_justify="left", caption_justify="left")
    table.title = f"the dearest {min(_SHOWN, len(result.costs))} of {len(result.costs)} parts, each pruned alone"
    table.add_column("kind", overflow="fold")
    table.add_column("block", overflow="fold")
    for column in ("loss", "of all", "perplexity", "weights"):
        table.add_column(column, justify="right")
    for cost in result.ranked[:_SHOWN]:
        perplexity = "–" if cost.perplexity is None else f"{cost.perplexity:.4g}"
        share = cost.weights / result.weights
        table.add_row(
            cost.kind, cost.block, f"{cost.loss:.4g}", _of(cost.loss, result.total), perplexity, f"{share:.1%}"
        )
    table.caption = f"loss: {MEANING[result.measure]}"
    saving = result.saving
    lines = [
        f"dense: perplexity {result.dense:.4g}; judged by {result.data}",
        *([] if result.calibration is None else [f"calibrated on {result.calibration}"]),
        f"all of it pruned: perplexity {saving.before:.4g}; {saving.after:.4g} with these left dense, "
        f"{saving.weights / result.weights:.1%} of the weights and {saving.share:.0%} of the loss:",
    ]
    head = Text(f"{result.model}, {result.spec}", "bold")
    return Group(head, kinds, by_block, table, *map(Text, lines))


def _sums(what: str, of: str, sums: dict[str, float], total: float) -> Table:
    table = Table()
    table.add_column(what, overflow="fold")
    table.add_column(f"loss, {of}", justify="right")
    table.add_column("of all", justify="right")
    for name, loss in sums.items():
        table.add_row(name, f"{loss:.4g}", _of(loss, total))
    return table


def _of(loss: float, total: float) -> str:
    return f"{loss / total:.0%}" if total > 0 else "–"
