"""Whole blocks and whole experts taken out: by the least importance, into models that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from support.families import MOE, deep, inputs, run
from support.folders import load
from torch import Tensor

import sparsify
from sparsify.errors import BackendError, SpecError, TraceError
from sparsify.method.spec import parse_pass
from sparsify.structure.replay import replay

# What adds to the residual stream in a block: at zero, the block passes its input on.
ENDS = {
    "llama": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "gemma2": ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"),
    "gpt2": ("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    "mixtral": ("self_attn.o_proj.weight", "mlp.experts.down_proj"),
}


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``five("llama")``: the folder of that family's model with five blocks; not to be written to."""

    def made(family: str) -> Path:
        folder = tmp_path_factory.mktemp("five") / family
        deep(family, 5).save_pretrained(folder)
        return folder

    return cache(made)


@pytest.mark.first(1)
@pytest.mark.parametrize("family", ENDS)
def test_a_model_without_blocks(family: str, five: Callable[[str], Path], tmp_path: Path) -> None:
    dense = five(family)
    passes = ["llm-pruner:40%,importance=l2,granularity=layer"]
    result = sparsify.compile(dense, passes, output=tmp_path / "out")
    (cut,) = result.structure[0].cuts
    assert (cut.kind, cut.before, cut.after) == ("layers", 5, 3) and len(cut.removed) == 2
    model, small = load(dense), load(tmp_path / "out")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            block = name.removeprefix(f"{cut.name}.").partition(".")
            if name.startswith(cut.name) and int(block[0]) in cut.removed and block[2] in ENDS[family]:
                # Gemma's norms multiply by one more than their weight.
                parameter.fill_(-1.0 if family == "gemma2" else 0.0)
    torch.testing.assert_close(run(small, inputs(family)), run(model, inputs(family)), rtol=1e-4, atol=1e-5)
    if family == "gemma2":
        kept = [i for i in range(5) if i not in cut.removed]
        assert small.config.layer_types == [model.config.layer_types[i] for i in kept]
    record = json.loads((tmp_path / "out" / "sparsify.json").read_text())["structure"][0]
    again = replay(dense, record["cuts"], tmp_path / "again", record["config"])
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.slow
def test_the_least_important_block_goes(five: Callable[[str], Path], tmp_path: Path, ids: Tensor) -> None:
    model = load(five("llama"))
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            if "proj" in name:
                parameter.mul_(1e-3)
    model.save_pretrained(tmp_path / "weak")
    for importance in ("l2", "taylor-first"):
        passes = [f"llm-pruner:20%,importance={importance},granularity=layer"]
        result = sparsify.compile(tmp_path / "weak", passes, calibration=[ids])
        assert result.structure[0].cuts[0].removed == (2,)
    passes = ["llm-pruner:20%,importance=l2,granularity=layer,keep_first=3"]
    assert sparsify.compile(tmp_path / "weak", passes).structure[0].cuts[0].removed[0] >= 3


@pytest.mark.slow
def test_whole_experts(tmp_path: Path) -> None:
    """Of eight, with a bias at the router: experts that are never chosen are experts that are not there."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**(MOE | {"num_experts_per_tok": 2}), num_local_experts=8, pad_token_id=0)
    transformers.GptOssForCausalLM(config).eval().save_pretrained(tmp_path / "dense")
    passes = ["llm-pruner:50%,importance=l2,granularity=expert,round=2"]
    result = sparsify.compile(tmp_path / "dense", passes, output=tmp_path / "out")
    model, small = load(tmp_path / "dense"), load(tmp_path / "out")
    assert [(c.kind, c.before, c.after) for c in result.structure[0].cuts] == [("experts", 8, 4)] * 2
    with torch.no_grad():
        for block, cut in zip(model.model.layers, result.structure[0].cuts, strict=True):
            block.mlp.router.bias[list(cut.removed)] = -1e9
    torch.testing.assert_close(run(small, inputs("gpt_oss")), run(model, inputs("gpt_oss")), rtol=1e-4, atol=1e-5)
    with pytest.raises(TraceError, match="chooses 2 of 1"):
        sparsify.compile(tmp_path / "dense", ["llm-pruner:87%,importance=l2,granularity=expert,round=1"])


def test_experts_that_are_stored_one_by_one(folder: Callable[[str], Path], tmp_path: Path) -> None:
    dense = folder("mixtral")
    sparsify.compile(dense, ["llm-pruner:50%,importance=l2,granularity=expert"], output=tmp_path / "out")
    small = load(tmp_path / "out")
    assert small.config.num_local_experts == 2 and small.model.layers[0].mlp.experts.gate_up_proj.shape[0] == 2
    assert bool(run(small, inputs("mixtral")).isfinite().all())


def test_names_follow_the_blocks_that_move_up(five: Callable[[str], Path], ids: Tensor) -> None:
    """What --ignore names in block 4 stays dense where it is block 3; the name of the block that went means nothing."""
    dense = five("llama")
    passes = ["llm-pruner:20%,importance=l2,granularity=layer,keep_last=2", "wanda:50%"]
    (gone,) = sparsify.compile(dense, passes[:1]).structure[0].cuts[0].removed
    assert gone < 3
    ignore = ["model.layers.4.mlp*", f"model.layers.{gone}.self_attn.q_proj"]
    result = sparsify.compile(dense, passes, calibration=[ids], ignore=ignore)
    assert result.structure[0].cuts[0].removed == (gone,) and result.structure[0].cuts[0].after == 4
    pruned = {site.name for site in result.runs[0].sites}
    skipped = {s.node for s in result.runs[0].skipped if s.reason == "named by --ignore"}
    assert skipped == {f"model.layers.3.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert {f"model.layers.{i}.mlp.up_proj" for i in range(3)} <= pruned and not skipped & pruned


def test_names_follow_the_experts_that_move_up(folder: Callable[[str], Path]) -> None:
    """Of four experts two go. Of those that stay the second alone may be pruned, whatever its number was."""
    dense = folder("mixtral")
    structural = "llm-pruner:50%,importance=l2,granularity=expert"
    removed = sparsify.compile(dense, [structural]).structure[0].cuts[0].removed
    last = max({0, 1, 2, 3} - set(removed))
    ignore = [f"model.layers.0.block_sparse_moe.experts.{e}.w2" for e in range(4) if e != last]
    result = sparsify.compile(dense, [structural, "magnitude:50%"], ignore=ignore)
    for layer, expected in ((0, [0.0, 0.5]), (1, [0.5, 0.5])):
        zeros = result.weight(f"model.layers.{layer}.mlp.experts.down_proj") == 0
        assert zeros.flatten(1).float().mean(dim=1).tolist() == expected


def test_what_is_refused(folder: Callable[[str], Path]) -> None:
    for options in ("granularity=layer,scope=global", "granularity=layer,widths=ragged", "granularity=floor"):
        with pytest.raises(SpecError):
            parse_pass(f"llm-pruner:50%,{options}")
    llama = folder("llama")
    for spec, match in (
        ("llm-pruner:10%,importance=l2,granularity=layer", "0 of 2 blocks would go"),
        ("llm-pruner:50%,importance=l2,granularity=layer,keep_first=2", "of which 0 may"),
        ("llm-pruner:50%,importance=l2,granularity=expert", "nothing that can be removed"),
    ):
        with pytest.raises(SpecError, match=match):
            sparsify.compile(llama, [spec])
    with pytest.raises(SpecError, match="2 stacks of blocks"):
        sparsify.compile(folder("t5"), ["llm-pruner:50%,importance=l2,granularity=layer"])
    with pytest.raises(BackendError, match="blocks of different kinds"):
        sparsify.compile(folder("deepseek_v3"), ["llm-pruner:50%,importance=l2,granularity=layer"])
