"""Models whose layers come to differ in width: written, loaded, evaluated, pruned further, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command_line import sparsify as command
from support.families import inputs, run, save
from support.folders import load
from support.manifests import edit_manifest
from support.zeroed import zeroed_model
from torch import Tensor

import sparsify
from sparsify.errors import BackendError, CheckpointError, SpecError
from sparsify.frontend.source import open_source
from sparsify.method.spec import parse_pass
from sparsify.quality.perplexity import perplexity

# Attention of these has its sizes built in.
HEADS_REFUSED = ("falcon", "gpt2", "mamba", "mamba2", "opt", "phi3", "t5")
MORE = ("convnext", "deepseek_v3", "falcon", "gpt_neox", "gpt_oss", "mamba", "phi3", "t5", "vit")
SLOW = [pytest.param(f, marks=pytest.mark.slow) for f in MORE]


def check(dense: Path, out: Path, family: str, passes: list[str], **options: object) -> sparsify.Compiled:
    result = sparsify.compile(dense, passes, output=out, **options)  # type: ignore[arg-type]
    exact = run(zeroed_model(dense, result.structure[0]), inputs(family))
    torch.testing.assert_close(run(sparsify.load(out), inputs(family)), exact, rtol=1e-4, atol=1e-5)
    return result


@pytest.mark.first(3)
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", *SLOW])
def test_a_block_that_stays_whole(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    dense = folder(family)
    passes = ["llm-pruner:50%,importance=l2,keep_first=1"]
    if family in HEADS_REFUSED:
        with pytest.raises(BackendError, match="width built in"):
            sparsify.compile(dense, passes, output=tmp_path / "none")
        assert not (tmp_path / "none").exists()
        if family in ("mamba", "mamba2"):
            return
        only = {"only": ["*mlp*", "*fc1*", "*fc2*", "*DenseReluDense*"]}
        named = {
            k: [n for n in v if any(n.strip("*") in p for p in open_source(dense).weights.parameters())]
            for k, v in only.items()
        }
        check(dense, tmp_path / "out", family, passes, **named)
    else:
        check(dense, tmp_path / "out", family, passes)
    with pytest.raises((RuntimeError, ValueError, OSError)):
        load(tmp_path / "out")


Ragged = tuple[Path, Path, sparsify.Compiled]


@pytest.fixture(scope="module")
def ragged(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Ragged:
    """A dense folder, the one whose first block is narrower than its last, and what was done."""
    out = tmp_path_factory.mktemp("ragged") / "out"
    return folder("llama"), out, check(folder("llama"), out, "llama", ["llm-pruner:50%,importance=l2,keep_last=1"])


@pytest.fixture(scope="module")
def more(ragged: Ragged) -> Path:
    """The narrower model pruned further, to 2:4."""
    out = ragged[1].with_name("more")
    result = sparsify.compile(ragged[1], ["wanda:2:4"], calibration=[torch.arange(64).view(4, 16) % 60], output=out)
    assert result.runs[0].kept == 0.5
    return out


def test_a_ragged_folder_loads_and_generates(ragged: Ragged) -> None:
    dense, out, result = ragged
    assert any("sparsify.load(OUT)" in line for line in result.structure[0].lines())
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 64
    model = sparsify.load(out)
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [32, 64]
    prompt, options = torch.tensor([[5, 6]]), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = zeroed_model(dense, result.structure[0]).generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options), wanted)
    assert sparsify.load(out, dtype=torch.bfloat16).dtype is torch.bfloat16


def test_gradients_choose_in_a_ragged_model_too(folder: Callable[[str], Path], tmp_path: Path, ids: Tensor) -> None:
    check(folder("llama"), tmp_path / "out", "llama", ["llm-pruner:50%,keep_last=1"], calibration=[ids])


def test_a_ragged_folder_is_evaluated_and_pruned_further(ragged: Ragged, more: Path, ids: Tensor) -> None:
    assert perplexity(open_source(ragged[1]), ids) > 1
    weight = sparsify.load(more).model.layers[0].mlp.up_proj.weight
    assert weight.shape == (32, 32) and int((weight != 0).sum()) == weight.numel() // 2
    said = command("verify", more, "--weights-only")
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.slow
def test_a_ragged_folder_becomes_onnx_and_is_verified(ragged: Ragged, tmp_path: Path) -> None:
    sparsify.compile(ragged[1], [], output=tmp_path / "onnx", to="onnx")
    said = command("verify", tmp_path / "onnx")
    assert said.returncode == 0 and "of torch's" in said.stdout, said.stdout + said.stderr


@pytest.mark.parametrize("backend", ["packed:choice=smallest", "cuda"])
def test_backends_that_cannot_say_it_refuse_a_ragged_folder(more: Path, tmp_path: Path, backend: str) -> None:
    with pytest.raises(BackendError, match="different widths"):
        sparsify.compile(more, [], output=tmp_path / "none", to=backend)
    assert not (tmp_path / "none").exists()


def test_heads_and_channels_of_all_layers_together(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """One layer's weights are a hundredth: a global choice takes its share from where it costs least, by kinds."""
    from safetensors.torch import load_file, save_file

    dense = save("qwen2", tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    for name in tensors:
        if "layers.0.mlp.up_proj" in name:
            tensors[name][:48] *= 1e-3
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    result = check(dense, tmp_path / "out", "qwen2", ["llm-pruner:50%,importance=l1,scope=global,group=last"])
    cuts = {(c.kind, c.name.split(".")[2]): (c.before, c.after) for c in result.structure[0].cuts}
    assert sum(before - after for (kind, _), (before, after) in cuts.items() if kind == "channels") == 64
    assert all(after >= 1 and after % 8 == 0 for (kind, _), (_, after) in cuts.items() if kind == "channels")


def test_wrong_words_and_damaged_lists(folder: Callable[[str], Path], tmp_path: Path) -> None:
    for text in (
        "llm-pruner:25%,granularity=channel,keep_first=1",
        "llm-pruner:25%,keep_first=-1",
        "llm-pruner:25%,steps=0",
        "llm-pruner:25%,scope=everywhere",
    ):
        with pytest.raises(SpecError):
            parse_pass(text)
    dense = folder("llama")
    sparsify.compile(dense, ["llm-pruner:50%,importance=l2,keep_first=1"], output=tmp_path / "out")
    with pytest.raises(SpecError, match="nothing that can be removed"):
        sparsify.compile(dense, ["llm-pruner:50%,importance=l2,keep_first=9"], output=tmp_path / "none")
    for damage in ([["model.layers.0.mlp.nothing", 0, [1]]], [["model.layers.0.mlp.up_proj.weight", 7, [1]]], 5, [[1]]):
        edit_manifest(tmp_path / "out", lambda m, d=damage: m["structure"][0]["cuts"][0].update(members=d))  # type: ignore[misc]
        with pytest.raises(CheckpointError):
            sparsify.load(tmp_path / "out")
