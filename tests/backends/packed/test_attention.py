"""Packed models take our attention for one token, and give the tokens of transformers' whatever cache there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import sparsify
from sparsify.runtime import arguments
from sparsify.runtime.cpu import attending

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama whose heads are as wide as the kernels want them, pruned, as it is and packed."""
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "dense")
    sparsify.compile(root / "dense", ["magnitude:2:4"], output=root / "hf")
    sparsify.compile(root / "hf", to="packed:choice=smallest", output=root / "packed")
    return root / "hf", root / "packed"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each call of ours had."""
    found: list[int] = []
    check = arguments.check_attend

    def counted(query: Tensor, key: Tensor, *rest: Any) -> None:
        found.append(key.shape[2])
        check(query, key, *rest)

    monkeypatch.setattr(attending.arguments, "check_attend", counted)
    return found


def open_model(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def generated(model: Any, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(IDS) if mask is None else mask
    fixed = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}
    return Tensor(model.generate(IDS, attention_mask=mask, **fixed, **options))


PADDED = torch.ones_like(IDS)
PADDED[0, :4] = 0
WAYS: dict[str, dict[str, Any]] = {
    "a growing cache": {},
    "padding": {"mask": PADDED},
    "a static cache": {"cache_implementation": "static", "disable_compile": True},
    "a static cache and padding": {"cache_implementation": "static", "disable_compile": True, "mask": PADDED},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_transformers(way: str, folders: tuple[Path, Path], calls: list[int]) -> None:
    dense, packed = (open_model(folder) for folder in folders)
    want = generated(dense, **WAYS[way])
    assert not calls, "a model that is not packed keeps its own"
    assert torch.equal(generated(packed, **WAYS[way]), want)
    assert len(calls) == 2 * 7, "every layer of every token after the first"


COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
COMMON |= {"vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**COMMON, "num_key_value_heads": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 32}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
# What differs in attention: windows, norms of heads, learned positions, values of another width, ALiBi, mixed layers.
FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {**GROUPED, "sliding_window": 8},
    "Qwen3": {**GROUPED, "head_dim": 32},
    "Gemma3Text": {**GROUPED, "head_dim": 16, "sliding_window": 8},
    "Cohere2": {**GROUPED, "sliding_window": 8},
    "Phi3": GROUPED,
    "Olmo2": GROUPED,
    "Mixtral": {**GROUPED, "num_local_experts": 4},
    "GPTNeoX": COMMON,
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64, "eos_token_id": 2},
    "OPT": {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64},
    "DeepseekV3": {**COMMON, **LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "Falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "alibi": True},
    "Llama4Text": {**GROUPED, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96},
}
# Whose attention is a function of transformers' that can be put in the place of another.
ASKED = sorted(set(FAMILIES) - {"Falcon"})


@pytest.mark.first(3)
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_generate_the_tokens_of_transformers(family: str, tmp_path: Path, calls: list[int]) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    sparsify.compile(tmp_path / "dense", ["magnitude:60%"], output=tmp_path / "hf")
    sparsify.compile(tmp_path / "hf", to="packed:choice=smallest", output=tmp_path / "packed")
    dense, packed = open_model(tmp_path / "hf"), open_model(tmp_path / "packed")
    for options in ({}, {"mask": PADDED}):
        want = generated(dense, **options)
        calls.clear()
        assert torch.equal(generated(packed, **options), want)
        assert bool(calls) == (family in ASKED)


def test_continuous_batching_goes_on(folders: tuple[Path, Path]) -> None:
    """It asks for implementations by their names."""
    found = []
    for folder in folders:
        model = open_model(folder)
        settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=-1, pad_token_id=0)
        outputs = model.generate_batch([row.tolist() for row in IDS], generation_config=settings, progress_bar=False)
        found.append([answer.generated_tokens for answer in outputs.values()])
    assert found[0] == found[1] and len(found[0]) == 2


def test_gradients_and_other_implementations_go_their_own_way(folders: tuple[Path, Path], calls: list[int]) -> None:
    packed = open_model(folders[1])
    packed.get_input_embeddings().weight.requires_grad_(True)
    packed(IDS[:, :1])
    assert not calls, "where gradients may be asked for torch keeps what they want"
    with torch.no_grad():
        packed(IDS[:, :1])
    assert len(calls) == 2
    eager = open_model(folders[1], attn_implementation="eager")
    with torch.no_grad():
        eager(IDS[:, :1])
    assert len(calls) == 2


def test_nothing_of_it_is_saved(folders: tuple[Path, Path], tmp_path: Path) -> None:
    packed = open_model(folders[1])
    assert packed.config._attn_implementation == "sdpa"
    packed.save_pretrained(tmp_path / "again")
    assert "attn_implementation" not in (tmp_path / "again" / "config.json").read_text()


def test_who_registered_another_implementation_keeps_it(folders: tuple[Path, Path], calls: list[int]) -> None:
    """Ours stands before the one that there was, and gives way to one that comes later."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    before: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    own: list[int] = []

    def other(*given: Any, **options: Any) -> Any:
        own.append(1)
        return before(*given, **options)

    AttentionInterface.register("sdpa", other)
    try:
        packed = open_model(folders[1])
        want = generated(open_model(folders[0]))
        own.clear()
        assert torch.equal(generated(packed), want)
        assert own and len(own) < 2 * 8, "it has the prompt, and ours the tokens"
        assert len(calls) == 2 * 7
    finally:
        AttentionInterface.register("sdpa", before)
