"""Tensors that the model's class does not know: carried over and listed, unless they show that the config is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import sparsify as command
from support.families import save
from support.folders import load

import sparsify
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.errors import CheckpointError
from sparsify.frontend.source import open_source

Tensors = dict[str, torch.Tensor]
IDS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))


def layer(tensors: Tensors, number: int) -> Tensors:
    """Another layer like the first."""
    first = "model.layers.0."
    return {f"model.layers.{number}.{n.removeprefix(first)}": t.clone() for n, t in tensors.items() if first in n}


STRANGE: dict[str, Callable[[Tensors], Tensors]] = {
    "value head": lambda t: {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)},
    "old buffers": lambda t: {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
                              "model.position_ids": torch.arange(8)[None]},
    "further prediction": lambda t: {"mtp.fc.weight": torch.ones(32, 64),
                                     **{f"mtp.{n.removeprefix('model.')}": v for n, v in layer(t, 0).items()}},
    "further layer": lambda t: {**layer(t, 2), "model.layers.2.eh_proj.weight": torch.ones(32, 64),
                                "model.layers.2.enorm.weight": torch.ones(32)},
}  # fmt: skip


def with_tensors(folder: Path, make: Callable[[Tensors], Tensors], **config: Any) -> list[str]:
    """Put further tensors into ``folder``; their names."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    more = make(tensors)
    save_file(tensors | more, path, metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    return sorted(more)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "model")


@pytest.mark.parametrize("kind", STRANGE)
def test_they_are_carried_and_listed(model: Path, tmp_path: Path, kind: str) -> None:
    names = with_tensors(model, STRANGE[kind])
    made = sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out")
    assert made.output is not None and sorted(made.manifest["unknown_tensors"]) == names
    assert any(f"{len(names)} tensors that LlamaForCausalLM has no place for" in note for note in made.notes)
    before, after = load_file(model / "model.safetensors"), load_file(made.output / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in names)
    load(made.output)
    with pytest.raises(CheckpointError, match=f"{len(names)} of {len(before)} tensors have no place .*strict"):
        open_source(model, strict=True)


def test_other_outputs_carry_them_too(model: Path, tmp_path: Path) -> None:
    names = with_tensors(model, lambda t: STRANGE["value head"](t) | STRANGE["old buffers"](t))
    before = load_file(model / "model.safetensors")
    packed = sparsify.compile(model, ["magnitude:2:4"], to="packed:choice=smallest", output=tmp_path / "packed")
    assert packed.output is not None and any("v_head" in note for note in packed.notes)
    load(packed.output)
    back = load_file(unpack_folder(packed.output, tmp_path / "back") / "model.safetensors")
    sparsify.compile(model, ["llm-pruner:25%"], calibration=[IDS], output=tmp_path / "small")
    small = load_file(tmp_path / "small" / "model.safetensors")
    for name in names:
        assert torch.equal(before[name], back[name]) and torch.equal(before[name], small[name])


def test_at_the_command_line(model: Path, tmp_path: Path) -> None:
    with_tensors(model, STRANGE["value head"])
    words = ["compile", model, "--pass", "magnitude:2:4", "-o", tmp_path / "out"]
    strict = command(*words, "--strict")
    assert strict.returncode == 1 and "first v_head.summary.bias" in strict.stderr
    done = command(*words)
    assert done.returncode == 0 and "carried over as they are: 2 tensors" in done.stdout


def test_layers_that_the_config_does_not_count(model: Path) -> None:
    """They are of the model: to carry them along would be to leave half of it out."""
    with_tensors(model, lambda t: layer(t, 2) | layer(t, 3))
    with pytest.raises(CheckpointError) as caught:
        open_source(model)
    assert "model.layers.2 is a layer like model.layers.0" in str(caught.value)
    assert "counts 2 of them: let it count 4" in str(caught.value)
    with_tensors(model, lambda t: {}, num_nextn_predict_layers=1)
    assert len(open_source(model).weights.unknown) == 18


def test_experts_that_the_config_does_not_count(tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path / "model")
    with_tensors(folder, lambda t: {n.replace("experts.0", "experts.4"): v.clone() for n, v in t.items()})
    with pytest.raises(CheckpointError, match=r"tensors have no place|by config\.json"):
        open_source(folder)


def test_the_config_of_another_model(model: Path, tmp_path: Path) -> None:
    other = save("gpt2", tmp_path / "other")
    (model / "config.json").write_bytes((other / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"Does config\.json belong to these weights") as caught:
        open_source(model)
    assert "is not there" in str(caught.value)


def test_a_vocabulary_that_was_enlarged(model: Path) -> None:
    def enlarge(tensors: Tensors) -> Tensors:
        return {n: torch.cat([tensors[n], torch.ones(6, 32)]) for n in ("model.embed_tokens.weight", "lm_head.weight")}

    with_tensors(model, enlarge)
    with pytest.raises(CheckpointError, match=r"vocab_size 64, the file has 70 rows.*say vocab_size 70 there"):
        open_source(model)
    with_tensors(model, lambda t: {}, vocab_size=70)
    open_source(model)


def test_one_parameter_twice(model: Path) -> None:
    with_tensors(model, lambda t: {"embed_tokens.weight": t["model.embed_tokens.weight"].clone()})
    with pytest.raises(CheckpointError, match=r"two tensors in the folder are it, embed_tokens\.weight and model"):
        open_source(model)
