"""Models as people hold them in memory: wrapped, chatty, adapted; and files that were saved from within a wrapper."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, build, save
from support.folders import load, same_files
from torch import nn

import sparsify
from sparsify.errors import CheckpointError
from sparsify.frontend.modules import save_module, unwrapped
from sparsify.frontend.source import open_source

IDS = [torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_saved_as_transformers_saves_it(family: str, tmp_path: Path) -> None:
    model = build(family)
    (tmp_path / "ours").mkdir()
    save_module(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


@pytest.mark.slow
def test_settings_that_transformers_does_not_save(tmp_path: Path) -> None:
    model = build("llama")
    model.generation_config.update(temperature=0.6, top_p=0.9, do_sample=False)
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path / "theirs")
    made = sparsify.compile(model, ["magnitude:2:4"], calibration=IDS, output=tmp_path / "out")
    assert made.output is not None
    settings = json.loads((made.output / "generation_config.json").read_text())
    assert settings["temperature"] == 0.6 and load(made.output).generation_config.temperature == 0.6
    sparsify.compile(model, ["llm-pruner:25%"], calibration=IDS, output=tmp_path / "small")
    load(tmp_path / "small")


class Wrapper(nn.parallel.DistributedDataParallel):
    """As a process group makes it, without one."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model),
    "compiled in place": lambda model: model.compile() or model,  # type: ignore[func-returns-value]
    "parallel": nn.DataParallel,
    "distributed": Wrapper,
    "both": lambda model: torch.compile(Wrapper(model)),
}


@pytest.mark.first(2)
@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_wrapped_around_a_model(kind: str, tmp_path: Path) -> None:
    model = build("llama")
    for name, given in (("want", build("llama")), ("out", WRAPPED[kind](model))):
        made = sparsify.compile(given, ["wanda:2:4"], calibration=IDS, output=tmp_path / name)
    assert same_files(tmp_path / "want", tmp_path / "out") and type(made.model) is type(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), build("llama").parameters(), strict=True))


def adapted() -> Any:
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(build("llama"), lora)


def prompted() -> Any:
    return peft.get_peft_model(build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def with_adapter() -> nn.Module:
    model: nn.Module = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), build("llama"))
    return model


def in_part() -> nn.Module:
    model = build("llama")
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (prompted, "the model is a PeftModelForCausalLM"),
        (with_adapter, "model.layers.0.self_attn.q_proj is a"),
        (in_part, "model.layers.0 in it is wrapped, in a OptimizedModule"),
    ],
)
def test_what_cannot_be_taken_off_is_named(make: Callable[[], nn.Module], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        sparsify.compile(make(), ["magnitude:2:4"], calibration=IDS, output=tmp_path / "out")
    assert says in str(caught.value) and ".out-" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.first(1)
@pytest.mark.parametrize("around", [lambda model: model, torch.compile], ids=["itself", "compiled"])
def test_a_model_of_peft_is_pruned_as_its_merge(around: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, given in (("out", around(model)), ("want", adapted().merge_and_unload())):
        sparsify.compile(given, ["wanda:2:4"], calibration=IDS, output=tmp_path / name)
    assert same_files(tmp_path / "want", tmp_path / "out")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_ordinary_module_is_itself() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    assert unwrapped(net) is net


RENAMED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "distributed": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "the other way": lambda name: f"_orig_mod.module.{name}",
    "compiled layers": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "sharded": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
}


def rename(folder: Path, how: Callable[[str], str]) -> Path:
    path = folder / "model.safetensors"
    save_file({how(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


@pytest.mark.first(2)
@pytest.mark.parametrize("kind", RENAMED)
def test_names_that_a_wrapper_left_in_a_file(kind: str, tmp_path: Path) -> None:
    folder = rename(save("llama", tmp_path / "model"), RENAMED[kind])
    sparsify.compile(save("llama", tmp_path / "plain"), ["wanda:2:4"], calibration=IDS, output=tmp_path / "want")
    made = sparsify.compile(folder, ["wanda:2:4"], calibration=IDS, output=tmp_path / "out")
    assert same_files(tmp_path / "want", tmp_path / "out")
    assert made.output is not None and any("without the names of wrappers" in note for note in made.notes)
    load(made.output)


def test_two_names_that_become_one(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    more: dict[str, Any] = {"_orig_mod.lm_head.weight": tensors["lm_head.weight"].clone()}
    save_file(tensors | more, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is the same without its wrapper"):
        open_source(folder)
