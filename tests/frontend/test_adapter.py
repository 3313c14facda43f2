"""LoRA adapters on top of a model: refused by name, or merged as peft merges them, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import sparsify as command
from support.families import build
from support.folders import load

import sparsify
from sparsify.errors import CheckpointError, SpecError
from sparsify.files.ledger import write_manifest
from sparsify.frontend.source import open_source
from sparsify.tensors import digest

IDS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
LAYER = "base_model.model.model.layers.9.self_attn.q_proj"
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(family: str, folder: Path, dtype: torch.dtype = torch.float32, beside: bool = False, **options: Any) -> Any:
    """A base model in ``folder/base`` and an adapter (``beside``: in the same folder); what peft merges of them."""
    model = build(family).to(dtype)
    model.save_pretrained(folder / "base")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False} | options)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            parameter.data *= 3
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    wrapped.save_pretrained(folder / ("base" if beside else "adapter"))
    if beside:
        (folder / "base" / "README.md").unlink(missing_ok=True)
    shutil.copytree(folder / "base", folder / "plain")
    for path in (folder / "plain").glob("adapter_*"):
        path.unlink()
    base = type(model).from_pretrained(folder / "plain", dtype=dtype)
    return peft.PeftModel.from_pretrained(base, folder / ("base" if beside else "adapter")).merge_and_unload()


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": TARGETS}),
    "rslora": ("llama", {"target_modules": TARGETS, "use_rslora": True}),
    "patterns": (
        "llama",
        {"target_modules": TARGETS, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"v_proj": 9}},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "whole head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "of a tied head": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True}),
    "of a renamed model": ("vit", {"target_modules": ["q_proj", "v_proj"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_merges(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, options = KINDS[kind]
    theirs = adapted(family, tmp_path, dtype, **options).state_dict()
    weights = open_source(tmp_path / "adapter", adapter="merge").weights
    assert all(torch.equal(weights.read(name), theirs[name]) for name in theirs if name in weights)
    base = open_source(tmp_path / "plain").weights
    changed = [n for n in base.parameters() if n in weights and not torch.equal(base.read(n), weights.read(n))]
    assert changed and weights.canonical("lm_head.weight") == (
        "lm_head.weight" if kind == "of a tied head" else base.canonical("lm_head.weight")
    )


@pytest.mark.parametrize("beside", [True, False], ids=["beside its base", "alone"])
def test_an_adapter_is_refused_by_name(beside: bool, tmp_path: Path) -> None:
    adapted("llama", tmp_path, beside=beside, target_modules=TARGETS)
    folder = tmp_path / ("base" if beside else "adapter")
    says = "on the weights" if beside else f"it lies on those of {tmp_path}/base"
    for options in ({}, {"check": False}):
        with pytest.raises(CheckpointError, match="merge it first") as caught:
            sparsify.compile(folder, ["magnitude:2:4"], output=tmp_path / "out", **options)
        assert "LORA of rank 4" in str(caught.value) and says in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", pytest.param("packed:choice=smallest", marks=pytest.mark.slow)])
def test_what_is_written_is_the_merged_model_pruned(to: str, tmp_path: Path) -> None:
    model = adapted("llama", tmp_path, beside=True, target_modules=TARGETS)
    model.save_pretrained(tmp_path / "merged")
    want = sparsify.compile(tmp_path / "merged", ["wanda:2:4"], calibration=[IDS], to=to, output=tmp_path / "want")
    made = sparsify.compile(
        tmp_path / "base", ["wanda:2:4"], calibration=[IDS], to=to, adapter="merge", output=tmp_path / "out"
    )
    assert made.output is not None and want.output is not None
    assert not list(made.output.glob("adapter*")) and made.manifest["adapter"] == {"rank": 4, "alpha": 6, "tensors": 12}
    one, other = load_file(want.output / "model.safetensors"), load_file(made.output / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    load(made.output)


@pytest.mark.slow
def test_a_smaller_model_of_a_merged_one(tmp_path: Path) -> None:
    adapted("llama", tmp_path, target_modules=TARGETS).save_pretrained(tmp_path / "merged")
    for name, model, options in (("want", "merged", {}), ("out", "adapter", {"adapter": "merge"})):
        sparsify.compile(tmp_path / model, ["llm-pruner:25%"], calibration=[IDS], output=tmp_path / name, **options)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("want", "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_tokenizer_beside_the_adapter_is_the_models(tmp_path: Path, bundled: Path) -> None:
    adapted("llama", tmp_path, target_modules=TARGETS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    made = sparsify.compile(tmp_path / "adapter", ["magnitude:2:4"], adapter="merge", output=tmp_path / "out")
    assert made.source.tokenizer() is not None and (tmp_path / "out" / "chat_template.jinja").exists()
    assert json.loads((tmp_path / "out" / "sparsify.json").read_text())["digests"]["files"].keys() >= {"tokenizer.json"}


def test_at_the_command_line(tmp_path: Path) -> None:
    adapted("llama", tmp_path, beside=True, target_modules=TARGETS)
    words = ["compile", str(tmp_path / "base"), "--pass", "magnitude:2:4", "-o", str(tmp_path / "out")]
    assert command(*words).returncode == 1
    done = command(*words, "--adapter", "merge")
    assert done.returncode == 0 and "merged an adapter of rank 4" in done.stdout
    assert command(*words, "--adapter", "drop").returncode == 2
    none = command("compile", tmp_path / "plain", *words[2:4], "-o", tmp_path / "other", "--adapter", "merge")
    assert none.returncode == 2


def broken(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "use_dora: True"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa', which changes the base model"),
        ({"alpha_pattern": {"(a+)+": 1}}, "an alpha_pattern of expressions"),
        ({"base_model_name_or_path": None}, "adapter_config.json names none"),
        ({"base_model_name_or_path": "adapter"}, "no folder of a model alone"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"target_parameters": ["x"]}, "target_parameters"),
    ],
)
def test_other_adapters_are_refused(changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    adapted("llama", tmp_path, target_modules=TARGETS)
    broken(tmp_path / "adapter", **changes)
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / "adapter", adapter="merge")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(4, 32)}), "layers.9"),
        (lambda t: t.update({"base_model.model.elsewhere.weight": torch.ones(4)}), "no parameter of the model"),
        (lambda t: t.update({k: v[:, :3].clone() for k, v in t.items() if "lora_A" in k}), "it is for"),
        (lambda t: t.pop(next(k for k in t if "lora_B" in k)), "no matrix of the folder"),
        (lambda t: t[next(iter(t))].fill_(float("nan")), "NaN"),
    ],
)  # fmt: skip
def test_adapters_of_other_models(change: Any, says: str, tmp_path: Path) -> None:
    adapted("llama", tmp_path, target_modules=TARGETS)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / "adapter", adapter="merge")
    assert says in str(caught.value)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_of_ours_is_held_against_what_was_written(file: str, tmp_path: Path) -> None:
    adapted("llama", tmp_path, target_modules=TARGETS)
    folder = tmp_path / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    write_manifest(folder, {}, {name: digest(tensor) for name, tensor in tensors.items()})
    assert open_source(folder, adapter="merge").name == "adapter"
    path = folder / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        open_source(folder, adapter="merge")


def test_nothing_to_merge(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"no adapter_config\.json"):
        open_source(tmp_path, adapter="merge")
    with pytest.raises(SpecError, match="a module in memory"):
        open_source(build("llama"), adapter="merge")
