"""Which models channels are reordered in: any shape of a family, quantised ones, weights that layers share; and what is
said of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from support import families, quantized
from support.families import GQA, LLAMA, TOKENS, build, inputs
from support.folders import load
from torch import Tensor, nn

import sparsify
from sparsify.errors import CalibrationError, SpecError
from sparsify.frontend.source import open_source

DOWN = "model.layers.0.mlp.down_proj"


def permuted(model: Any, spec: str = "permute:2:4", **options: Any) -> Any:
    return sparsify.compile(model, [spec], calibration=[inputs("llama", rows=4)], device="cpu", **options)


def alike(before: Tensor, after: Tensor) -> bool:
    """But for the order in which a sum is rounded."""
    return torch.allclose(before, after, rtol=0, atol=1e-5 * max(1.0, float(before.abs().max())))


def names(result: Any) -> list[str]:
    (run,) = result.runs
    return [group.name for group in run.channels]


def left(result: Any) -> dict[str, str]:
    (run,) = result.runs
    return {refused.node: refused.reason for refused in run.skipped}


def llama(width: int, heads: int, shared: int, inner: int, experts: int) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**(
        LLAMA | {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads // shared,
                 "intermediate_size": inner, "tie_word_embeddings": bool(experts % 2)})))  # fmt: skip


def mixtral(width: int, heads: int, shared: int, inner: int, experts: int) -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**(
        LLAMA | {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads // shared,
                 "intermediate_size": inner, "num_local_experts": experts})))  # fmt: skip


def gpt2(width: int, heads: int, shared: int, inner: int, experts: int) -> Any:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=width, n_layer=2, n_head=heads, n_inner=inner, vocab_size=64, n_positions=64, **TOKENS)
    )


def opt(width: int, heads: int, shared: int, inner: int, experts: int) -> Any:
    return hf.OPTForCausalLM(
        hf.OPTConfig(hidden_size=width, ffn_dim=inner, num_hidden_layers=2, num_attention_heads=heads, vocab_size=64,
                     max_position_embeddings=64, word_embed_proj_dim=width))  # fmt: skip


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, mixtral, gpt2, opt])
def test_the_function_is_the_same_at_any_shape(make: Callable[..., Any]) -> None:
    """Whole groups or not, heads of one group or several; what stays in its order says why."""

    @settings(max_examples=5, deadline=None)
    @given(
        heads=st.sampled_from([(2, 1), (4, 1), (4, 2), (4, 4)]),
        each=st.sampled_from([2, 4, 6, 8, 12, 16]),
        inner=st.sampled_from([8, 12, 16, 20, 48, 64]),
        experts=st.integers(2, 4),
        pattern=st.sampled_from([(1, 2), (2, 4), (4, 8)]),
        seed=st.integers(0, 9),
    )
    def drawn(heads: tuple[int, int], each: int, inner: int, experts: int, pattern: tuple[int, int], seed: int) -> None:
        torch.manual_seed(seed)
        model = make(heads[0] * each, heads[0], heads[1], inner, experts).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        n, m = pattern
        moving = {"attention": each, "mlp": inner}
        free = [where for where, size in moving.items() if size % m == 0 and size >= 2 * m]
        # A matrix whose rows do not hold whole groups is not pruned, and its inputs have no need of an order.
        if not free:
            with pytest.raises(SpecError, match=f"permute:{n}:{m}: no"):
                permuted(model, f"permute:{n}:{m}")
            return
        batch = inputs("llama", rows=4, seed=seed)
        result = permuted(model, f"permute:{n}:{m}")
        assert len(names(result)) + len(left(result)) == 4
        assert len(names(result)) == 2 * len(free)
        before, after = families.run(model, batch), families.run(result.model, batch)
        assert alike(before, after), float((before - after).abs().max())
        (run,) = result.runs
        assert all(group.before <= group.after for group in run.channels)

    drawn()


FORMS = [
    quantized.block_fp8,
    pytest.param(quantized.gptq, marks=pytest.mark.slow),
    pytest.param(quantized.mxfp4, marks=pytest.mark.slow),
]


@pytest.mark.first(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_quantized_source_is_its_dense_weights_in_another_order(form: Any, dtype: str, tmp_path: Path) -> None:
    """As other passes have it: read dense, and written dense; no number of it is lost."""
    folder = form(tmp_path / "small")
    result = permuted(folder, output=tmp_path / "out", dtype=dtype)
    assert len(names(result)) == 4
    was = open_source(folder, dtype=dtype)
    now = open_source(tmp_path / "out")
    moved = set(result.runs[0].written)
    for name in was.weights.parameters():
        one, other = was.weights.read(name), now.weights.read(name)
        assert one.dtype == other.dtype
        assert torch.equal(one.flatten().float().sort().values, other.flatten().float().sort().values), name
        assert name in moved or torch.equal(one, other), name
    assert any(not torch.equal(was.weights.read(name), now.weights.read(name)) for name in moved)
    # The function, of a folder in which only what the first block reads is in its old order.
    permuted(folder, output=tmp_path / "half", dtype=dtype, only=["*.1.mlp"])
    whole, half = (families.run(load(tmp_path / name).float(), inputs("llama", rows=4)) for name in ("out", "half"))
    assert alike(whole, half)


def test_an_embedding_that_is_the_head_too_stays() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GQA, tie_word_embeddings=True)).eval()
    result = permuted(model)
    assert len(names(result)) == 4 and result.model.lm_head.weight is result.model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, result.model.lm_head.weight)
    assert alike(families.run(model, inputs("llama")), families.run(result.model, inputs("llama")))


def gate_is_up(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj.weight = model.model.layers[0].mlp.up_proj.weight


def one_mlp(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def one_layer(model: Any) -> None:
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    one_mlp(model)


@pytest.mark.first(1)
@pytest.mark.parametrize(("share", "groups"), [(gate_is_up, 4), (one_mlp, 3), (one_layer, 2)])
def test_a_weight_that_is_read_twice_is_reordered_once(share: Callable[[Any], None], groups: int) -> None:
    model = build("llama")
    share(model)
    result = permuted(model)
    assert len(names(result)) == groups and not left(result)
    assert alike(families.run(model, inputs("llama")), families.run(result.model, inputs("llama")))
    assert not torch.equal(
        model.model.layers[0].mlp.down_proj.weight, result.model.model.layers[0].mlp.down_proj.weight
    )


def test_albert_reads_one_block_again_and_again() -> None:
    torch.manual_seed(0)
    model = hf.AlbertForMaskedLM(
        hf.AlbertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=64,
                        embedding_size=16)).eval()  # fmt: skip
    result = permuted(model)
    assert len(names(result)) == 2
    assert alike(families.run(model, inputs("llama")), families.run(result.model, inputs("llama")))


def test_a_matrix_of_two_blocks_stays_and_is_listed() -> None:
    """What makes its inputs lies in both of them."""
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    result = permuted(model)
    assert names(result) == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert left(result) == {DOWN: f"{DOWN}.weight is shared by several blocks, whose channels would have to move alike"}
    assert alike(families.run(model, inputs("llama")), families.run(result.model, inputs("llama")))


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("inner", "spec", "reason"),
    [
        (66, "permute:2:4", "66 channels may change places, and are no whole groups of 4"),
        (32, "permute:16:32", "32 channels may change places, and are a single group"),
    ],
)
def test_widths_that_are_no_groups_stay_and_are_listed(inner: int, spec: str, reason: str) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(GQA | {"intermediate_size": inner, "head_dim": 64}))).eval()
    result = permuted(model, spec)
    assert len(names(result)) == 2 and left(result)[DOWN] == reason


def test_a_model_without_such_groups_says_why_of_each(tmp_path: Path) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(GQA | {"intermediate_size": 66})))
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(SpecError, match=r"permute:4:8: no channels .*o_proj: 8 .*single group; .*66.*no whole groups"):
        permuted(tmp_path / "dense", "permute:4:8", output=tmp_path / "out")
    with pytest.raises(SpecError, match=r"permute:1:5: nothing to prune .*32 is not a multiple of 5"):
        permuted(tmp_path / "dense", "permute:1:5", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Told(nn.Module):
    """Blocks whose hidden channels are told apart: each is weighted by its place, or by those before it."""

    def __init__(self, apart: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.apart = apart
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 16)]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for up, down in self.layers:  # type: ignore[misc]
            x = x + down(self.apart(up(x)))
        return x


@pytest.mark.parametrize(
    "apart",
    [lambda h: h * torch.arange(32), lambda h: h.cumsum(-1), lambda h: h.sort(-1).values, lambda h: h.roll(1, -1)],
)
def test_channels_that_are_told_apart_stay(apart: Callable[[Tensor], Tensor]) -> None:
    ids = torch.randint(0, 64, (4, 8))
    # The same blocks are reordered where no channel is told from another.
    assert len(names(sparsify.compile(Told(torch.relu), ["permute:2:4"], calibration=[ids]))) == 2
    with pytest.raises(SpecError, match=r"no channels that may change places \(layers.0.1: .*Leave permute out"):
        sparsify.compile(Told(apart), ["permute:2:4"], calibration=[ids])


def test_no_data_is_said_before_anything_is_done(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    with pytest.raises(CalibrationError, match=r"inputs are unknown. Give batches"):
        sparsify.compile(net, ["permute:2:4"])
    with pytest.raises(CalibrationError, match="no batches"):
        sparsify.compile(net, ["permute:2:4"], calibration=[], output=tmp_path / "out")
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        sparsify.compile(net, ["permute:2:4"], calibration=[torch.full((2, 8), torch.nan)])
    assert not (tmp_path / "out").exists()
