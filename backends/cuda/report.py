"""Which kernel serves which layers for how many tokens, in lines for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from sparsify.backends.packed.labels import siblings_label
from sparsify.backends.packed.plan import Decision
from sparsify.runtime.cuda.dispatch import Plan, Timings


def kernels_by_tokens(
    decisions: Iterable[Decision],
    groups: Sequence[Sequence[str]],
    plan_of: Callable[[Decision], str],
    timings: Mapping[str, Timings],
) -> list[str]:
    """One line for each plan: the kernels by token count, each with its measured gain over cuBLAS, and the layers."""
    by_name = {d.name: d for d in decisions}
    found: dict[str, dict[str, int]] = {}
    for group in groups:
        members = [by_name[name] for name in group]
        if any(d.site is None for d in members):
            continue
        rows, columns = sum(d.linear.shape[0] for d in members), members[0].linear.shape[1]
        label = f"{siblings_label(group)} {rows}×{columns}"
        layers = found.setdefault(describe(plan_of(members[0]), timings.get(group[0])), {})
        layers[label] = layers.get(label, 0) + 1
    return [
        f"{text}: " + ", ".join(f"{label} (×{count})" for label, count in layers.items())
        for text, layers in found.items()
    ]


def describe(plan: str, timings: Timings | None = None) -> str:
    """``1-8 tokens decode_w8_r1_m1 (1.52×), …``: the gain is that at the most tokens of its range that were
    measured.
    """
    found = Plan.parse(plan)
    parts: list[str] = []
    low = 1
    for limit, kernel in zip([*found.limits, None], found.kernels, strict=True):
        span = f"{low}+" if limit is None else f"{low}-{limit}" if limit > low else str(low)
        gain = ""
        if timings is not None and timings.micro:
            inside = [t for t in timings.micro if t >= low and (limit is None or t <= limit)]
            gain = "".join(f" ({timings.gain(t):.2f}×)" for t in inside[-1:])
        parts.append(f"{span} tokens {kernel}{gain}" if not parts else f"{span} {kernel}{gain}")
        low = (limit or 0) + 1
    return ", ".join(parts)
