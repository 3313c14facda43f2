"""A dense copy beside packed weights on CPUs: only where it is asked for, and the same numbers either way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.matrices import pruned_24
from support.serving_vllm import PROMPTS, expected, tokens_of
from torch import nn
from torch.nn.functional import linear

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")

from sparsify.backends.vllm.asked import asked_policy
from sparsify.backends.vllm.beside import Copies
from sparsify.backends.vllm.config import SparsifyConfig
from sparsify.backends.vllm.products import OnDevice, hold, run
from sparsify.errors import CheckpointError, SpecError
from sparsify.runtime.cpu.stopwatch import Stopwatch
from sparsify.runtime.layout import pack

Engine = Callable[..., Any]
BOTH = {"sparsify": {"policy": "both"}}
CPU = torch.device("cpu")


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Where dense products of 2 tokens and more are faster: the numbers of tokens raced, into a cache of their own."""
    raced: list[int] = []

    def race(self: Stopwatch, calls: Sequence[Callable[[], Any]], rounds: int = 7) -> list[float]:
        tokens = calls[0]().shape[0]
        raced.append(tokens)
        return [1.0, 0.5 if tokens > 1 else 2.0]

    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Stopwatch, "race", race)
    return raced


def layers(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers


def copies(llm: Any) -> int:
    """Products that have a dense copy, of all layers."""
    every = (m.sparsify_products for m in layers(llm).modules() if isinstance(getattr(m, "sparsify_products", 0), list))
    return sum(product.behind is not None for products in every for product in products)


def test_nobody_asked(folders: dict[str, Path], engine: Engine, races: list[int]) -> None:
    assert copies(engine(folders["mixed"])) == 0 and not races


def test_tokens_are_the_same_with_copies(folders: dict[str, Path], engine: Engine, races: list[int]) -> None:
    # Together prompts and steps are of several tokens and dense; one alone is packed when it generates.
    llm = engine(folders["mixed"], additional_config=BOTH)
    assert copies(llm) == 12 and races
    assert tokens_of(llm) == expected(folders["mixed"])
    assert tokens_of(llm, PROMPTS[:1]) == expected(folders["mixed"])[:1]


def test_a_compiled_model_with_copies(
    folders: dict[str, Path], engine: Engine, races: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    llm = engine(folders["int4"], enforce_eager=False, additional_config=BOTH)
    assert copies(llm) == 8
    assert tokens_of(llm) == expected(folders["int4"])
    assert tokens_of(llm, PROMPTS[:1]) == expected(folders["int4"])[:1]


def test_a_folder_asks_and_who_serves_it_decides(
    folders: dict[str, Path], engine: Engine, races: list[int], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["mixed"], tmp_path / "asks")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["cpu"] = {"policy": "both"}
    (folder / "config.json").write_text(json.dumps(config))
    llm = engine(folder)
    assert copies(llm) == 12
    del llm
    assert copies(engine(folder, additional_config={"sparsify": {"policy": "decode"}})) == 0


def test_experts_stay_packed(folders: dict[str, Path], engine: Engine, races: list[int]) -> None:
    llm = engine(folders["experts"], additional_config=BOTH)
    assert tokens_of(llm) == expected(folders["experts"])
    assert copies(llm) == 4


def test_it_is_measured_once(races: list[int], tmp_path: Path) -> None:
    packed, x = pack(pruned_24(32, 128), "packed24"), torch.randn(4, 128)
    for name in ("the first", "the second"):
        layer = nn.Module()
        products = hold(layer, name, [packed], OnDevice(CPU, copies=Copies()))
        assert products[0].behind.turns == (2,)
        want = linear(x, pruned_24(32, 128))
        assert torch.allclose(run(layer, products, x, None), want, atol=1e-4)
        assert torch.allclose(run(layer, products, x[:1], None), want[:1], atol=1e-4)
        bias = torch.randn(32)
        assert torch.allclose(run(layer, products, x, bias), want + bias, atol=1e-4)
    assert races == [1, 2, 3, 4, 6, 8, 16, 32, 64, 256]
    kept = json.loads((tmp_path / "cache" / "turns.json").read_text())
    assert kept["turns"] == {"32x128 float32 packed24 5": [2]}


def test_no_copy_is_kept_where_none_is_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(Stopwatch, "race", lambda self, calls, rounds=7: [1.0, 1.0])
    layer = nn.Module()
    (product,) = hold(layer, "a layer", [pack(pruned_24(32, 128), "packed24")], OnDevice(CPU, copies=Copies()))
    assert product.behind is None and not hasattr(layer, "weight_place")


BAD: dict[str, tuple[Any, str]] = {
    "no object": ("both", "--additional-config of sparsify: 'both': no object"),
    "another key": ({"polcy": "both"}, "'polcy': no such key. Near names: policy"),
    "a near word": ({"policy": "bth"}, "the policy 'bth': no such policy. Near names: both"),
    "a number": ({"policy": 2}, "the policy 2: no such policy. Near names: decode, both"),
    "of GPUs": ({"policy": "prefill"}, "the policy 'prefill': a policy of GPUs"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_asked(case: str) -> None:
    given, told = BAD[case]
    with pytest.raises(SpecError) as refused:
        asked_policy({"sparsify": given}, on_cpu=True)
    assert told in str(refused.value)


def test_what_can_be_asked() -> None:
    assert asked_policy({"sparsify": {"policy": "prefill"}}, on_cpu=False) == "prefill"
    assert asked_policy({"sparsify": {}}, on_cpu=True) == "decode"
    assert asked_policy({"another plug-in": 3}, on_cpu=True) is None
    assert asked_policy({}, on_cpu=True) is None


@pytest.mark.parametrize("cpu", ["both", {"policy": "prefill"}, {"policy": 1}, {"polcy": "both"}, []])
def test_a_damaged_folder(cpu: object) -> None:
    site = {"layout": "packed24", "rows": 64, "columns": 64, "experts": None, "transposed": False, "values": 2048}
    config = {"quant_method": "sparsify", "format": 1, "sites": {"a.weight": site}, "cpu": cpu}
    with pytest.raises(CheckpointError, match="cpu"):
        SparsifyConfig.from_config(config)
