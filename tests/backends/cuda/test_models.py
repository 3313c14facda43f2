"""Whole models for GPUs, as their users meet them. Kernels are the operator's reference here, or emulated where
said.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import sparsify as command
from support.families import build, inputs, run
from support.folders import load
from support.gpus import A100, H200, Emulated
from torch import nn

import sparsify
from sparsify.backends.cuda import job
from sparsify.backends.packed.loaded import Prepared, prepare, product
from sparsify.backends.packed.loaded.linear import PackedLinear
from sparsify.errors import BackendError, CheckpointError, SpecError
from sparsify.runtime.cuda import driver, ops
from sparsify.runtime.cuda import prepared as weight
from sparsify.runtime.cuda.dispatch import Timings
from sparsify.runtime.cuda.gpu import GPU
from sparsify.runtime.words import Policy

WIDE = ("llama", "qwen2", "gpt2")
MORE = ("phi3", "gpt_neox", "falcon", "opt", "mixtral", "mamba", "bert", "t5")


def wide(family: str, folder: Path) -> Path:
    """A model of hidden 64 in bfloat16: narrower matrices would not get smaller by packing."""
    torch.manual_seed(0)
    model = build(family)
    config = copy.deepcopy(model.config)
    sizes = {
        "hidden_size": 64,
        "n_embd": 64,
        "d_model": 64,
        "intermediate_size": 128,
        "ffn_dim": 128,
        "d_ff": 128,
        "word_embed_proj_dim": 64,
        "head_dim": 16,
        "d_kv": 16,
    }
    for name, value in sizes.items():
        if name in config.to_dict():
            setattr(config, name, value)
    wider = type(model)(config).to(torch.bfloat16).eval()
    for name, parameter in wider.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    wider.save_pretrained(folder)
    return folder


def write(family: str, folder: Path, to: str = "cuda", spec: str = "magnitude:2:4") -> tuple[Path, Path]:
    """The pruned model as an ordinary folder and as one for GPUs."""
    wide(family, folder / "dense")
    sparsify.compile(folder / "dense", [spec], output=folder / "hf")
    sparsify.compile(folder / "dense", [spec], output=folder / "cuda", to=to)
    return folder / "hf", folder / "cuda"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write("llama", tmp_path_factory.mktemp("llama"))


def prepared(folder: Path, policy: Policy = "decode", target: GPU = H200) -> tuple[Any, list[Prepared]]:
    model = load(folder)
    return model, prepare(model, policy, tune=False, target=target)


def layers(model: nn.Module) -> list[PackedLinear]:
    return [m for m in model.modules() if isinstance(m, PackedLinear)]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.03)


@pytest.mark.first(4)
@pytest.mark.parametrize("family", [*WIDE, *(pytest.param(f, marks=pytest.mark.slow) for f in MORE)])
def test_a_prepared_model_is_the_pruned_model(family: str, tmp_path: Path) -> None:
    hf, folder = write(family, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model, records = prepared(folder)
    assert records and all(r.plan is not None and r.reason is None for r in records)
    close(run(model, inputs(family)), run(load(hf), inputs(family)))
    names = {name for record in records for name in record.names}
    assert names == set(model.config.quantization_config.sites)
    for policy, target in (("prefill", A100), ("both", A100)):
        other, _ = prepared(folder, policy, target)
        close(run(other, inputs(family)), run(load(hf), inputs(family)))
    # Saved from a GPU it is portable again.
    model.save_pretrained(tmp_path / "again")
    close(run(load(tmp_path / "again"), inputs(family)), run(model, inputs(family)))
    with (tmp_path / "again" / "config.json").open() as file:
        assert json.load(file)["quantization_config"]["gpu"] == {"policy": "decode", "tune": True}


def test_siblings_are_one_product(llama: tuple[Path, Path]) -> None:
    model, records = prepared(llama[1])
    ends = {tuple(name.split(".")[-2] for name in r.names): r.shape for r in records}
    assert ends == {
        ("q_proj", "k_proj", "v_proj"): (128, 64),
        ("o_proj",): (64, 64),
        ("gate_proj", "up_proj"): (256, 64),
        ("down_proj",): (64, 128),
    }
    calls: list[int] = []
    original = product.linear_24_prepared

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(rest[3])
        return original(x, *rest)

    attention = model.model.layers[0].self_attn
    x, other = torch.randn(2, 3, 64).bfloat16(), torch.randn(1, 64).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "linear_24_prepared", counted)
        wanted = [p(x).clone() for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        assert calls == [128]
        # Called alone, twice, in another order or with another input each is still its own product.
        assert torch.equal(attention.v_proj(x), wanted[2]) and torch.equal(attention.k_proj(x), wanted[1])
        assert torch.equal(attention.q_proj(x), wanted[0]) and torch.equal(attention.q_proj(x), wanted[0])
        assert attention.k_proj(other).shape == (1, 32) and torch.equal(attention.k_proj(x), wanted[1])
        attention.v_proj(other)
    assert attention.q_proj.product._last is None, "an input is not held longer than needed"


def test_what_a_user_does_to_a_prepared_model(llama: tuple[Path, Path]) -> None:
    portable = load(llama[1])
    wanted = run(portable, inputs("llama"))
    model, _ = prepared(llama[1])
    got = run(model, inputs("llama"))
    close(got, wanted)
    state, own = model.state_dict(), portable.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[k], own[k]) for k in own)
    assert torch.equal(run(copy.deepcopy(model), inputs("llama")), got)
    model.load_state_dict(own)
    assert all(m.product.plan is None for m in layers(model)), "given other weights, a layer on a CPU is portable"
    assert torch.equal(run(model, inputs("llama")), wanted)
    prepare(model, tune=False, target=H200)
    assert torch.equal(run(model, inputs("llama")), got)
    model.to(torch.bfloat16)
    assert all(m.product.plan is not None for m in layers(model)), "a move to where it is changes nothing"
    half = model.to(torch.float16)
    assert all(m.product.plan is None and m.weight.dtype is torch.float16 for m in layers(half))
    assert torch.isfinite(run(half, inputs("llama"))).all()
    dense = prepared(llama[1])[0].dequantize()
    assert not layers(dense) and torch.equal(run(dense, inputs("llama")), run(load(llama[0]), inputs("llama")))


def test_layers_that_come_to_lie_on_a_gpu(llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With this CPU taken for one: loading, converting and filling a model end in the GPU's layouts."""
    monkeypatch.setattr(product, "GPU_TYPE", "cpu")
    monkeypatch.setattr(GPU, "of", lambda device: H200)
    measured: list[tuple[int, int]] = []

    def times(rows: int, columns: int, dtype: torch.dtype, *rest: Any) -> Timings:
        measured.append((rows, columns))
        fast = "decode_w4_r1_m1" if dtype is torch.bfloat16 else "decode_w16_r1_m1"
        return Timings({1: {"dense": 8.0, fast: 5.0}, 2048: {"dense": 80.0, "unpack": 90.0}})

    monkeypatch.setattr(weight, "timings_of", times)
    wanted = run(load(llama[0]), inputs("llama"))
    model = load(llama[1])
    assert len(measured) == 8 and {m.product.plan for m in layers(model)} == {"1:decode_w4_r1_m1,*:unpack"}
    assert sum(m.weight.nbytes for m in layers(model)[:3]) == 128 * 256 * 2 * 0.5625, "q, k, v as one, padded to 256"
    close(run(model, inputs("llama")), wanted)
    assert not prepare(model)[0].reason and len(measured) == 8, "what is prepared is not prepared again"
    prepare(model, "decode", tune=False)
    assert len(measured) == 8 and "wgmma" in str(layers(model)[0].product.plan)
    model.to(torch.float16)
    assert all(m.weight.dtype is torch.float16 and "wgmma" in str(m.product.plan) for m in layers(model))
    model.load_state_dict(load(llama[1], dtype=torch.float16).state_dict())
    assert all(m.product.plan is not None for m in layers(model))
    close(run(model, inputs("llama")).bfloat16(), wanted)
    assert {m.product.plan for m in layers(load(llama[1], dtype=torch.float16))} == {"1:decode_w16_r1_m1,*:unpack"}
    with pytest.warns(RuntimeWarning, match="float32"):
        assert not layers(load(llama[1], dtype=torch.float32))


def test_layers_of_one_product_on_two_devices(llama: tuple[Path, Path]) -> None:
    model = load(llama[1])
    model.model.layers[0].self_attn.k_proj.to("meta")
    with pytest.raises(BackendError, match="several devices"):
        prepare(model, target=H200)


def test_generation_and_compilation(llama: tuple[Path, Path]) -> None:
    model, _ = prepared(llama[1])
    dense = load(llama[1]).dequantize()
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    want = model.generate(ids, **options)
    assert want.shape == dense.generate(ids, **options).shape
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_weights_are_static_inputs_of_a_compiled_graph(llama: tuple[Path, Path]) -> None:
    """CUDA graphs would copy others before every replay: the whole model, for every token."""
    for policy, target in (("decode", H200), ("both", A100)):
        model, _ = prepared(llama[1], policy, target)
        seen: dict[str, bool] = {}

        def compiler(graph: Any, example: Any, seen: dict[str, bool] = seen) -> Any:
            for node in graph.graph.nodes:
                if node.op == "placeholder":
                    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
                    seen[str(node.target)] = static is not None
            calls = [n for n in graph.graph.nodes if n.target is torch.ops.sparsify.linear_24_prepared.default]
            assert len(calls) == 8, "two blocks of four products"
            return graph.forward

        with torch.no_grad():
            torch.compile(model, backend=compiler, fullgraph=True)(torch.tensor([[1, 2, 3]]), use_cache=False)
        weights = {name: static for name, static in seen.items() if "weight" in name or "bias" in name}
        assert len(weights) > 8 and all(weights.values()), [n for n, static in weights.items() if not static]


def test_what_has_no_kernel_becomes_dense_and_is_said(tmp_path: Path) -> None:
    dense = wide("mixtral", tmp_path / "dense")
    sparsify.compile(dense, ["magnitude:2:4"], output=tmp_path / "packed", to="packed:choice=smallest")
    model = load(tmp_path / "packed")
    with pytest.warns(RuntimeWarning, match="a stack of experts"):
        records = prepare(model, tune=False, target=H200)
    reasons = {r.names[0].rpartition(".")[2]: r.reason for r in records if r.plan is None}
    assert reasons.keys() == {"gate_up_proj", "down_proj"}
    close(run(model, inputs("mixtral")), run(load(tmp_path / "packed"), inputs("mixtral")))
    # What is saved then is what it is now.
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert not any("experts" in name for name in again.config.quantization_config.sites)
    close(run(again, inputs("mixtral")), run(model, inputs("mixtral")))

    wide_model = load(tmp_path / "packed", dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="float32"):
        prepare(wide_model, tune=False, target=H200)
    assert not layers(wide_model) and not hasattr(wide_model.config, "quantization_config")


def test_a_bitmask_becomes_dense(tmp_path: Path) -> None:
    dense = wide("llama", tmp_path / "dense")
    sparsify.compile(dense, ["magnitude:60%"], output=tmp_path / "packed", to="packed:choice=smallest")
    model = load(tmp_path / "packed")
    wanted = run(model, inputs("llama"))
    with pytest.warns(RuntimeWarning, match="not 2:4"):
        prepare(model, tune=False, target=H200)
    assert not layers(model)
    close(run(model, inputs("llama")), wanted)
    made = sparsify.compile(dense, ["magnitude:60%"], output=tmp_path / "none", to="cuda")
    assert "GPUs multiply 2:4 alone" in made.notes[0] and not layers(load(tmp_path / "none"))


def test_without_nvrtc_layers_stay_portable_for_triton(llama: tuple[Path, Path]) -> None:
    with pytest.warns(RuntimeWarning, match="8 weights wait for NVRTC"):
        model, records = prepared(llama[1], target=GPU("H200", (9, 0), 132, False, "cusparselt"))
    assert all(r.plan is None and "NVRTC" in str(r.reason) for r in records) and len(layers(model)) == 14
    assert torch.equal(run(model, inputs("llama")), run(load(llama[1]), inputs("llama")))


@pytest.mark.parametrize(("gpu", "some"), [(A100, "tiled"), (H200, "wgmma")], ids=["A100", "H200"])
def test_a_model_runs_on_the_kernels_themselves(
    gpu: GPU, some: str, llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder to logits, through every product's own CUDA code, emulated."""
    emulated = Emulated(torch.bfloat16)
    monkeypatch.setattr(driver, "module", lambda dtype, device: emulated)
    model, _ = prepared(llama[1], target=gpu)
    monkeypatch.setattr(product, "linear_24_prepared", ops._cuda)
    for length in (1, 12, 24):
        ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            close(model(ids).logits, load(llama[0])(ids).logits)
    used = {name.partition("_")[0] for name in emulated.launched}
    assert used == {"decode", some} and len(emulated.launched) >= 24


def test_the_report_names_kernels_by_count(tmp_path: Path) -> None:
    dense = wide("llama", tmp_path / "dense")
    result = sparsify.compile(dense, ["magnitude:2:4"], output=tmp_path / "out", to="cuda:policy=both,tune=false")
    text = "\n".join(result.notes)
    assert "1-8 tokens decode_w8_r1_m1, 9-16 decode_w8_r1_m2" in text and "257+ cusparselt:0" in text
    assert "self_attn.q/k/v_proj 128×64 (×2)" in text and "mlp.gate/up_proj 256×64 (×2)" in text
    assert "nothing was measured" in text and 'device_map="cuda"' in text
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["gpu"] == {"policy": "both", "tune": False} and config["format"] == 1
    sites = json.loads((tmp_path / "out" / "sparsify.json").read_text())["packed"]["sites"]
    gpu = [site["gpu"] for site in sites if site["layout"] == "packed24"]
    assert len(gpu) == 14 and all(g["plan"].endswith("cusparselt:0") and g["measured_us"] == {} for g in gpu)


def test_a_shape_that_is_faster_dense_stays_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with a GPU does when it writes the folder: its times decide, and the report has the gains."""

    def times(rows: int, *rest: Any) -> Timings:
        fast = 10.0 if rows == 64 else 5.0
        return Timings({1: {"dense": 8.0, "decode_w8_r1_m1": fast}, 2048: {"dense": 80.0, "unpack": 90.0}})

    monkeypatch.setattr(job, "current_gpu", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(job, "timings_of", times)
    monkeypatch.setattr(job.GPU, "of", lambda device: H200)
    dense = wide("llama", tmp_path / "dense")
    result = sparsify.compile(dense, ["magnitude:2:4"], output=tmp_path / "out", to="cuda")
    text = "\n".join(result.notes)
    assert "1 tokens decode_w8_r1_m1 (1.60×), 2+ unpack (0.89×): self_attn.q/k/v_proj " in text
    assert "dense is faster on NVIDIA H200 (1 token: 0.80× of the dense speed)" in text and "o_proj" in text
    assert {m.site.rows for m in layers(load(tmp_path / "out"))} == {32, 64, 128}
    kinds = {name.split(".")[-2] for name in load(tmp_path / "out").config.quantization_config.sites}
    assert kinds == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def test_wrong_words(llama: tuple[Path, Path], tmp_path: Path) -> None:
    dense = llama[0].parent / "dense"
    for spec in ("cuda:policy=fast", "cuda:speed=9", "cuda:tune=maybe"):
        with pytest.raises(SpecError):
            sparsify.compile(dense, ["magnitude:2:4"], output=tmp_path / "out", to=spec)
    with pytest.raises(BackendError, match="LowerSparse"):
        sparsify.compile(
            nn.Linear(64, 64), ["magnitude:2:4"], calibration=[torch.randn(1, 64)], output=tmp_path / "out", to="cuda"
        )
    with pytest.raises(SpecError, match="policy"):
        prepare(load(llama[1]), "fast")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("siblings", "all"),
        ("siblings", [["model.nothing.weight", "x"]]),
        ("gpu", {"policy": "fast"}),
        ("gpu", 3),
        ("gpu", {"tune": "yes"}),
        ("gpu", {"clock": 1}),
        ("siblings", [[1, 2]]),
    ],
)
def test_a_damaged_config_is_refused(llama: tuple[Path, Path], tmp_path: Path, key: str, value: Any) -> None:
    import shutil

    shutil.copytree(llama[1], tmp_path / "bad")
    config = json.loads((llama[1] / "config.json").read_text())
    config["quantization_config"][key] = value
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "bad")


def test_a_folder_for_gpus_runs_on_a_cpu_and_unpacks(llama: tuple[Path, Path], tmp_path: Path) -> None:
    close(run(load(llama[1]), inputs("llama")), run(load(llama[0]), inputs("llama")))
    said = command("unpack", llama[1], "-o", tmp_path / "back")
    assert said.returncode == 0, said.stderr
    for path in llama[0].glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bench_on_a_gpu_that_is_not_there(llama: tuple[Path, Path]) -> None:
    done = command("bench", llama[1], "--device", "cuda")
    assert done.returncode == 2 and "no CUDA device" in done.stderr
