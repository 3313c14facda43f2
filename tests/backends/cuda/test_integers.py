"""Models with 2:4 weights of 8 and 4 bits on a GPU, which is a plain reference or the emulator here."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.families import inputs, run
from support.folders import load
from support.gpus import A100, H200, Emulated
from support.matrices import error

import sparsify
from sparsify.backends.packed.loaded import product
from sparsify.backends.packed.loaded.linear import PackedLinear
from sparsify.backends.packed.loaded.on_gpu import prepare
from sparsify.errors import BackendError
from sparsify.runtime.cuda import driver, ops
from sparsify.runtime.cuda import prepared as weight
from sparsify.runtime.cuda.autotune.times import random_24
from sparsify.runtime.cuda.dispatch import Timings
from sparsify.runtime.cuda.gpu import GPU
from sparsify.runtime.cuda.integers import GRIDS, IntegerGrid, pack_fragments
from sparsify.runtime.cuda.products import run_kernel

FORMS = {"int8": "values=int8", "int4": "values=int4,group=64", "int4 of 32": "values=int4,group=32"}


@pytest.fixture(scope="module", params=list(FORMS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("integers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, pad_token_id=0, **sizes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(place / "dense")
    to = f"packed:choice=smallest,{FORMS[request.param]}"
    sparsify.compile(place / "dense", ["magnitude:2:4"], output=place / "out", to=to)
    return place / "out"


def layers(model: Any) -> list[PackedLinear]:
    return [m for m in model.modules() if isinstance(m, PackedLinear)]


def prepared(folder: Path) -> Any:
    model = load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        records = prepare(model, tune=False, target=H200)
    assert records and all(r.plan is not None and r.plan.startswith("8:int") for r in records)
    return model


def test_integers_stay_integers(folder: Path, tmp_path: Path) -> None:
    portable, model = load(folder), prepared(folder)
    assert {len(m.product.members) for m in layers(model)} == {1, 2, 3}, "siblings share a product"
    want = run(load(folder).dequantize(), inputs("llama"))
    got = run(model, inputs("llama"))
    assert error(got, want.double()) < 2e-2
    # What a user does to it.
    state, own = model.state_dict(), portable.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[k], own[k]) for k in own)
    assert torch.equal(run(copy.deepcopy(model), inputs("llama")), got)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(run(prepared(tmp_path / "again"), inputs("llama")), got)
    assert torch.equal(run(model.dequantize(), inputs("llama")), want)
    model = prepared(folder)
    model.load_state_dict(own)
    assert all(m.product.plan is None for m in layers(model))
    assert torch.equal(run(model, inputs("llama")), run(portable, inputs("llama")))


def test_a_model_runs_on_the_kernels_themselves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = Emulated(torch.bfloat16)
    monkeypatch.setattr(driver, "module", lambda dtype, device: emulated)
    model, dense = prepared(folder), load(folder).dequantize()
    monkeypatch.setattr(product, "linear_24_prepared", ops._cuda)
    for length in (1, 12, 20):
        ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            assert error(model(ids).logits, dense(ids).logits.double()) < 2e-2
    bits = 8 if any(m.site.bits == 8 for m in layers(model)) else 4
    kinds = {name.rsplit("_r1_", 1)[-1] for name in emulated.launched}
    assert kinds == {"m1", "m2", f"unpack_int{bits}"}


def test_layers_that_come_to_lie_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this CPU taken for one: what is measured of the shape and its integers decides."""
    monkeypatch.setattr(product, "GPU_TYPE", "cpu")
    monkeypatch.setattr(GPU, "of", lambda device: H200)
    asked: list[IntegerGrid] = []

    def times(rows: int, columns: int, *rest: Any) -> Timings:
        asked.append(rest[-1])
        return Timings({1: {"dense": 8.0, f"{rest[-1].kind}_w8_r1_m1": 5.0}, 64: {"dense": 8.0, "unpack": 9.0}})

    monkeypatch.setattr(weight, "timings_of", times)
    model = load(folder)
    assert len(asked) == 4 and len(set(asked)) == 1 and "*:unpack" in str(layers(model)[0].product.plan)
    assert {m.site.bits for m in layers(model)} == {asked[0].bits}
    # Joined: q, k and v, gate and up.
    assert sum(m.weight.nbytes for m in layers(model)[:3]) == 256 // 16 * asked[0].tile_bytes


@pytest.mark.parametrize(
    ("policy", "target", "dtype", "why"),
    [
        ("both", A100, torch.bfloat16, "under the policy 'both'"),
        ("decode", GPU("old", (7, 5), 40, True, None), torch.bfloat16, "no sparse tensor cores"),
        ("decode", GPU("bare", (9, 0), 132, False, None), torch.bfloat16, "without NVRTC"),
        ("decode", H200, torch.float32, "float32"),
    ],
    ids=["both", "old", "no compiler", "float32"],
)
def test_what_no_kernel_takes_gets_full_width(
    folder: Path, policy: Any, target: GPU, dtype: torch.dtype, why: str
) -> None:
    model = prepared(folder) if dtype is torch.bfloat16 else load(folder, dtype=dtype)
    with pytest.warns(RuntimeWarning) as caught:
        prepare(model, policy, tune=False, target=target)
    said = [str(w.message) for w in caught]
    assert any(why in text and "7 2:4 weights take the width of their dtype" in text for text in said), said
    assert all(m.site.bits is None for m in layers(model))
    assert (
        error(run(model, inputs("llama")), run(load(folder, dtype=dtype).dequantize(), inputs("llama")).double()) < 2e-2
    )


def test_a_kernel_and_a_weight_of_two_kinds() -> None:
    x = torch.randn(1, 256).bfloat16()
    fragments = {g: pack_fragments(random_24(16, 256, torch.bfloat16, x.device, g)) for g in (None, *GRIDS)}
    for grid, name in ((GRIDS[0], "decode_w8_r1_m1"), (None, "int8g64_w8_r1_m1"), (GRIDS[3], "int4g32_w8_r1_m1")):
        with pytest.raises(BackendError, match="weights of "):
            run_kernel(name, x, fragments[grid], None, None, 16)
