"""Tokens that vLLM generates of packed folders are transformers' own, in float32."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.serving_vllm import FOLDERS, PROMPTS, expected, half, model, packed, tokens_of, two_of_four

from sparsify.runtime.layout import Packed

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")

Engine = Callable[..., Any]


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_are_those_of_transformers(name: str, folders: dict[str, Path], engine: Engine) -> None:
    llm = engine(folders[name])
    assert tokens_of(llm) == expected(folders[name])
    assert tokens_of(llm, PROMPTS[:1]) == expected(folders[name])[:1]


# Of each vLLM's tokens are not transformers', packed or not: they are those of the dense checkpoint.
OF_DENSE = {
    "experts read one by one": ("deepseek_v3", {"gate_up": two_of_four, "experts.down": half, "o_proj": half}),
    "dense experts read one by one": ("deepseek_v3", {"o_proj": half}),
    "experts built under another name": ("minimax_m2", {"gate_up": two_of_four, "experts.down": half, "o_proj": half}),
    "renamed by a part of the model": ("gemma3n", {"altup": two_of_four, "per_layer_model": half, "mlp": two_of_four}),
}


@pytest.mark.parametrize("name", OF_DENSE)
def test_tokens_are_those_of_the_dense_checkpoint(name: str, engine: Engine, tmp_path: Path) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    made = model(*OF_DENSE[name])
    made.save_pretrained(tmp_path / "dense")
    want = tokens_of(engine(tmp_path / "dense"))
    cleanup_dist_env_and_memory()
    assert tokens_of(engine(packed(made, tmp_path / "packed"))) == want
    assert len({token for tokens in want for token in tokens}) > 4


@pytest.mark.parametrize("name", ["mixed", "experts"])
def test_weights_are_held_once(name: str, folders: dict[str, Path], engine: Engine) -> None:
    # vLLM keeps what loads a layer's parameters: what that was given is not to live as long.
    gc.collect()
    before = [id(one) for one in gc.get_objects() if isinstance(one, Packed)]
    llm = engine(folders[name])
    gc.collect()
    assert llm and not [one for one in gc.get_objects() if isinstance(one, Packed) and id(one) not in before]


def test_a_compiled_model(folders: dict[str, Path], engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # traced as ever, and not through a C++ compiler
    llm = engine(folders["other names"], enforce_eager=False)
    assert tokens_of(llm) == expected(folders["other names"])


def test_bfloat16_stays_packed_and_near(folders: dict[str, Path], engine: Engine) -> None:
    # vLLM's own choice for checkpoints of float32. Tokens may differ where logits are near; the first mostly does not.
    llm = engine(folders["mixed"], dtype="bfloat16")
    got, want = tokens_of(llm, tokens=1), [tokens[:1] for tokens in expected(folders["mixed"])]
    assert sum(a == b for a, b in zip(got, want, strict=True)) >= 4
    layer = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers[0].self_attn.qkv_proj
    # q is 2:4, k a bitmask, v dense: three products.
    assert {name: (tuple(t.shape), t.dtype) for name, t in layer.named_parameters() if "bias" not in name} == {
        "weight": ((128, 64), torch.bfloat16),
        "weight_1": ((64 * 128 // 2 + 64,), torch.bfloat16),
        "weight_2": ((64, 128), torch.bfloat16),
    }


def test_an_adapter(engine: Engine, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from vllm.lora.request import LoRARequest

    base = model("tied", {"proj": two_of_four})
    folder = packed(base, tmp_path)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "lora")
    adapted.generation_config.eos_token_id = None
    want = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        want.append(adapted.generate(input_ids=ids, **more)[0, len(prompt) :].tolist())
    llm = engine(folder, enable_lora=True, max_lora_rank=8)
    assert tokens_of(llm, lora_request=LoRARequest("a", 1, str(tmp_path / "lora"))) == want
    assert tokens_of(llm) != want


def test_the_transformers_backend(folders: dict[str, Path], engine: Engine) -> None:
    # Last in this file: it changes how transformers attends, in this process.
    for name in ("mixed", "other names"):
        llm = engine(folders[name], model_impl="transformers")
        assert tokens_of(llm) == expected(folders[name])
        del llm
