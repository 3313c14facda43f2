"""The sections of what else passes did, and of what none of them touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.provenance.markdown import short
from sparsify.reporting.facts import Facts
from sparsify.reporting.layers import left_by
from sparsify.reporting.markup import Markup, code, section, table, tag
from sparsify.reporting.words import named

# Names that are told before the rest waits for a click.
_FEW = 4
# Rows of a table that is open at first.
_ROWS = 24


def trained(facts: Facts) -> Markup:
    """What blocks gained that were trained, and groups of channels that were put in another order."""
    parts: list[object] = []
    for own in facts.passes:
        if regions := own.get("regions"):
            said = (
                "Losses on sequences that no block was trained on; less is better. A dash: the block stayed as it was."
            )
            parts += [tag("h3", own["spec"]), tag("p", said)]
            rows = [(code(r["name"]), r["loss"], f"{r['before']:.4g}", f"{r['after']:.4g}", _gain(r)) for r in regions]
            parts.append(_long(("block", "loss", "before", "after", "gain"), rows, (2, 3, 4)))
        if groups := own.get("channels"):
            said = "What the pattern would keep of Σ|W|²‖X‖² before and after channels changed places; more is better."
            parts += [tag("h3", own["spec"]), tag("p", said)]
            moved = [_moved(group) for group in groups]
            parts.append(_long(("read by", "channels", "moved", "before", "after"), moved, (1, 2, 3, 4)))
    return section("Blocks and channels", *parts)


def _long(head: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int]) -> Markup:
    """A table, folded where it has very many rows."""
    whole = table(head, rows, numbers)
    return whole if len(rows) <= _ROWS else tag("details", tag("summary", f"All {len(rows)} of them"), whole)


def _gain(region: Mapping[str, Any]) -> str:
    if region.get("rate") is None or not region["before"]:
        return "–"
    return f"{1 - region['after'] / region['before']:.1%}"


def _moved(group: Mapping[str, Any]) -> tuple[object, ...]:
    kept = f"{group['kept_before']:.2%}", f"{group['kept_after']:.2%}"
    return code(short(group["name"])), str(group["channels"]), str(group["moved"]), *kept


def structure(facts: Facts) -> Markup:
    """How many heads, channels or experts are left of each group."""
    parts: list[object] = []
    for record in facts.manifest.get("structure", ()):
        kinds: dict[tuple[str, str, str], list[str]] = {}
        for cut in record["cuts"]:
            key = (str(cut.get("kind", "")), str(cut.get("before", "")), str(cut.get("after", "")))
            kinds.setdefault(key, []).append(str(cut.get("name", "")))
        rows = [
            (kind, before, after, str(len(names)), code(short(names[0])))
            for (kind, before, after), names in kinds.items()
        ]
        parts += [tag("h3", record.get("spec", "a structural pass"))]
        parts.append(table(("what", "before", "after", "groups", "the first of them"), rows, (1, 2, 3)))
    return section("What was taken out whole", *parts)


def left_dense(facts: Facts) -> Markup:
    """Why weights were left as they were, and which."""
    reasons: dict[str, list[str]] = {}
    pruned = {site["name"] for own in facts.passes for site in own["sites"]}
    for name, reason in left_by(facts.passes):
        if name not in pruned:
            reasons.setdefault(reason, []).append(name)
    for opaque in facts.manifest.get("not_understood", ()):
        reasons.setdefault(str(opaque.get("reason")), []).append(", ".join(opaque.get("tensors", ())))
    for site in facts.manifest.get("packed", {}).get("sites", ()):
        if site.get("layout") == "dense" and not site.get("bits"):
            kind = str(site.get("reason", "")).partition(" (")[0]
            reasons.setdefault(f"not packed: {kind}", []).append(str(site.get("name")))
    parts = [
        tag("div", tag("h3", f"{_sentence(reason)} ({len(names)})"), _names(names)) for reason, names in reasons.items()
    ]
    return section("What stayed dense, and why", *parts)


def _sentence(reason: str) -> str:
    return f"{reason[:1].upper()}{reason[1:]}"


def _names(names: Sequence[str]) -> Markup:
    if len(names) <= _FEW:
        return tag("p", code(named(names)))
    return tag("details", tag("summary", code(named(names, _FEW - 1))), tag("p", code(", ".join(map(short, names)))))
