"""What ``sparsify bench`` shows of a GPU, from figures that were made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console

from sparsify.analysis.linear import LinearSite
from sparsify.backends.bench.benchmark import Benchmark, Speed
from sparsify.backends.bench.report import benchmark_report, write_report
from sparsify.backends.packed.choosing import Decision
from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.labels import siblings_label
from sparsify.backends.packed.loaded import Prepared
from sparsify.backends.packed.plan import summary


def made_up(gains: dict[int, float]) -> Benchmark:
    products = [
        Prepared(
            tuple(f"model.layers.{i}.self_attn.{n}_proj.weight" for n in "qkv"),
            (12288, 4096),
            "bfloat16",
            5,
            9,
            "*:unpack",
            gains,
        )
        for i in range(2)
    ] + [Prepared(("lm_head.weight",), (64, 64), "bfloat16", 9, 9, None, {}, "dense is faster here")]
    return Benchmark(
        "OUT",
        "MODEL",
        ("checkpoint", "packed"),
        "NVIDIA H200",
        2,
        ("bfloat16", "bfloat16"),
        128,
        64,
        5,
        Speed(1000, 1100, 1.1, 1, 1.2),
        Speed(100, 140, 1.4, 1.3, 1.5),
        True,
        (10**9, 6 * 10**8),
        None,
        [],
        "cuda:0",
        (10**9, 6 * 10**8),
        products,
    )


def shown(result: Benchmark) -> str:
    console = Console(width=80, record=True, quiet=False, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(benchmark_report(result))
    return console.export_text()


def test_products_by_number_of_tokens(tmp_path: Path) -> None:
    result = made_up({1: 1.7, 8: 1.62, 2048: 0.97})
    text = shown(result)
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if "q/k/v_proj" in line)
    assert row.split() == ["self_attn.q/k/v_proj", "×2", "12288×4096", "1.70×", "1.62×", "–", "–", "–", "0.97×"]
    assert next(line for line in text.splitlines() if "lm_head" in line).split()[3:] == ["dense"] * 6
    assert "NVIDIA H200, bfloat16" in text and "weights on the GPU" in text and "threads" not in text
    write_report(result, tmp_path)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["device"] == "cuda:0" and written["products"][0]["gains"]["8"] == 1.62
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    assert "nothing was measured" in shown(made_up({}))
    write_report(made_up({}), tmp_path)


def test_labels() -> None:
    assert siblings_label(["a.0.mlp.gate_proj.weight", "a.0.mlp.up_proj.weight"]) == "mlp.gate/up_proj"
    assert siblings_label(["h.3.attn.c_attn.weight"]) == "attn.c_attn"
    assert siblings_label(["b.0.query.weight", "b.0.key.weight"]) == "query/key"
    assert siblings_label(["b.0.attn.q.weight", "b.0.mlp.up.weight"]) == "attn.q + mlp.up"


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_what_stays_dense_is_named_with_its_reason(count: int) -> None:
    """What was pruned, that is: of what never was nothing is said."""
    linear, site = cast(LinearSite, None), cast(PackedSite, SimpleNamespace(layout="packed24", label="packed24"))
    packed = Decision("a", linear, 0.5, 100 << 10, 60 << 10, site)
    never = Decision("b", linear, 0.04, 9, 9, reason="it is shared")
    left = [Decision(f"c{i}", linear, 0.05, 100, 100, reason="dense is faster") for i in range(count)]
    first, *others, last = summary([packed, never, *left])
    more = f" and {count - 3} more" if count > 3 else ""
    assert "1 as packed24; 60 KiB where dense took 100 KiB (0.600×)" in first and "sparsify bench" in last
    assert others == [f"left dense: {', '.join(d.name for d in left[:3])}{more}: dense is faster"]
