"""From the names of transformers' modules to those that checkpoints, and so vLLM, have."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf
from support.families import build

from sparsify.backends.vllm.names import CheckpointNames, WholeStacks
from sparsify.errors import BackendError

BLOCK = "model.layers.0."


def names_of(model: Any) -> CheckpointNames:
    # As a config.json says it.
    model.config.architectures = [type(model).__name__]
    return CheckpointNames(model.config)


SAME = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt2", "qwen3_moe")


@pytest.mark.parametrize("family", SAME)
def test_most_families_have_one_name_for_both(family: str) -> None:
    model = build(family)
    names = names_of(model)
    for name, _ in model.named_parameters():
        assert names.rename_source_key(name) == (name, None)


def test_mixtral_has_another() -> None:
    names = names_of(build("mixtral"))
    found = {
        f"{BLOCK}mlp.experts.gate_up_proj_meta": f"{BLOCK}block_sparse_moe.experts.w13_meta",
        f"{BLOCK}mlp.experts.down_proj": f"{BLOCK}block_sparse_moe.experts.w2",
        f"{BLOCK}mlp.gate.weight": f"{BLOCK}block_sparse_moe.gate.weight",
        f"{BLOCK}self_attn.q_proj.weight_mask": f"{BLOCK}self_attn.q_proj.weight_mask",
        "lm_head.weight": "lm_head.weight",
    }
    assert {name: names.rename_source_key(name)[0] for name in found} == found


def test_a_head_of_another_name() -> None:
    names = names_of(build("gpt_neox"))
    assert names.rename_source_key("lm_head.weight")[0] == "embed_out.weight"


def test_a_part_of_a_larger_model_has_the_names_of_its_own() -> None:
    config = hf.CONFIG_MAPPING["gemma3n_text"]
    small = config(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, intermediate_size=[64] * 2, num_hidden_layers=2,
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=16,
        activation_sparsity_pattern=[0.0] * 2, laurel_rank=8, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    small.architectures = ["Gemma3nForCausalLM"]
    name = f"{BLOCK}self_attn.q_proj.weight_meta"
    assert CheckpointNames(small).rename_source_key(name) == (name, None)


def test_stacks_that_are_loaded_whole_are_called_as_what_holds_them() -> None:
    found = {
        f"{BLOCK}mlp.experts.gate_up_proj": f"{BLOCK}mlp.experts.routed_experts.w13_weight",
        f"{BLOCK}mlp.experts.gate_up_proj_meta": f"{BLOCK}mlp.experts.routed_experts.w13_weight_meta",
        f"{BLOCK}mlp.experts.down_proj_mask": f"{BLOCK}mlp.experts.routed_experts.w2_weight_mask",
        f"{BLOCK}mlp.shared_experts.down_proj.weight": f"{BLOCK}mlp.shared_experts.down_proj.weight",
        f"{BLOCK}mlp.experts.0.down_proj.weight": f"{BLOCK}mlp.experts.0.down_proj.weight",
    }
    assert {name: WholeStacks().rename_source_key(name)[0] for name in found} == found


def test_a_parameter_that_checkpoints_do_not_have_is_refused() -> None:
    config = hf.AutoConfig.for_model("hrm_text") if "hrm_text" in hf.CONFIG_MAPPING else None
    if config is None:
        pytest.skip("this transformers has no family that splits what its checkpoints fuse")
    config.architectures = ["HrmTextForCausalLM"]
    names = CheckpointNames(config)
    with pytest.raises(BackendError, match=r"mlp\.gate_up_proj\.weight"):
        names.rename_source_key("model.layers.0.mlp.gate_proj.weight")


def test_a_model_with_code_of_its_own_keeps_its_names() -> None:
    config = build("llama").config
    config.architectures = ["NobodysForCausalLM"]
    assert not CheckpointNames(config)
