"""Models of several models: a vision tower and a language model, with text alone and with images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.families import GQA
from support.vlms import VLMS, build, text, with_image
from torch import Tensor, nn

import sparsify
from sparsify.data.inputs import as_inputs
from sparsify.errors import BackendError, CalibrationError, SpecError, TraceError
from sparsify.frontend.capture import capture
from sparsify.frontend.skeleton import build_skeleton
from sparsify.frontend.source import open_source
from sparsify.frontend.tracing.both_ways import reads_both_ways
from sparsify.frontend.tracing.mends import mended
from sparsify.frontend.tracing.positions import with_positions
from sparsify.ir.graph import runnable

QUICK = ("gemma3", "mistral3", "qwen2_vl")
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VLMS]


def folder(name: str, where: Path) -> Path:
    build(name).save_pretrained(where)
    return where


@pytest.mark.parametrize("name", VLMS)
def test_what_no_checkpoint_holds_is_what_the_real_model_has(name: str, tmp_path: Path) -> None:
    real = dict(build(name).named_non_persistent_buffers())
    found = dict(build_skeleton(folder(name, tmp_path)).named_non_persistent_buffers())
    assert found.keys() == real.keys()
    assert all(torch.equal(found[key], real[key]) for key in real)


@pytest.mark.first(2)
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", EACH)
def test_the_graph_is_the_model(name: str, image: bool, tmp_path: Path) -> None:
    source = open_source(folder(name, tmp_path))
    batch = with_positions(source.module, with_image(name) if image else as_inputs(text()["input_ids"], source))
    program = capture(source, batch)
    made = runnable(program, torch.device("cpu"))(*[batch[node.meta["input"]] for node in program.inputs])
    logits = made if isinstance(made, Tensor) else made[program.output_names.index("logits")]
    model = build(name)
    with torch.no_grad(), mended(model):
        wanted = model(**batch, use_cache=False).logits
    assert torch.allclose(logits, wanted, atol=1e-6), float((logits - wanted).abs().max())


@pytest.mark.slow
def test_text_without_token_types_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """PaliGemma's causal mask is left out outside a trace, and its attention then looks both ways."""
    source, batch = open_source(folder("paligemma", tmp_path / "model")), text(2)
    made = runnable(capture(source, batch), torch.device("cpu"))(batch["input_ids"])
    with torch.no_grad():
        wanted = build("paligemma")(**batch, use_cache=False).logits
    assert torch.allclose(made, wanted, atol=1e-6)
    for other in ("attention_mask", "position_ids"):
        with pytest.raises(TraceError, match="depends on the numbers in"):
            capture(source, batch | {other: torch.ones_like(batch["input_ids"])})
    with pytest.raises(BackendError, match="reads a text in both directions"):
        sparsify.compile(tmp_path / "model", [], to="onnx", output=tmp_path / "out")


def test_attention_that_looks_both_ways_unless_a_text_is_padded_is_told(tmp_path: Path) -> None:
    """AIMv2's text model makes a causal mask where it is given one of padding, and transformers leaves it out where
    that says nothing; a CLIP's attention is told that it is causal.
    """
    own = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text_part = own | {"vocab_size": 64, "max_position_embeddings": 32, "eos_token_id": 63}
    vision = own | {"image_size": 16, "patch_size": 8}
    model = hf.Aimv2Model(hf.Aimv2Config(text_config=text_part, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(tmp_path / "model")
    batch = {"input_ids": torch.randint(1, 60, (2, 12)), "pixel_values": torch.randn(2, 3, 16, 16)}
    source = open_source(tmp_path / "model")
    capture(source, batch)
    with pytest.raises(TraceError, match=r"depends on the numbers in the attention mask.*without the attention mask"):
        capture(source, batch | {"attention_mask": torch.ones_like(batch["input_ids"])})
    with pytest.raises(BackendError, match="reads a text in both directions"):
        sparsify.compile(tmp_path / "model", [], calibration=[batch], to="onnx", output=tmp_path / "out")
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=text_part, vision_config=vision, projection_dim=16)).eval()
    assert not reads_both_ways(clip)


def test_a_model_whose_mask_itself_looks_both_ways_takes_padding() -> None:
    """EmbeddingGemma's: nothing about it depends on numbers."""
    config = hf.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=8, use_bidirectional_attention=True, pad_token_id=0)
    model = hf.Gemma3TextModel(config).eval()
    assert not reads_both_ways(model)
    ids = torch.randint(1, 60, (2, 12))
    mask = torch.ones_like(ids)
    made = runnable(capture(open_source(model), {"input_ids": ids, "attention_mask": mask}), torch.device("cpu"))
    mask[0, -3:] = 0
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(made(ids, mask)[mask == 1], wanted[mask == 1], atol=1e-5)


@pytest.mark.first(1)
@pytest.mark.parametrize("name", EACH)
def test_text_leaves_the_tower_as_it_was_and_says_so(name: str, tmp_path: Path) -> None:
    source = folder(name, tmp_path / "model")
    made = sparsify.compile(source, ["wanda:2:4"], calibration=[text(2)], output=tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and not any("vis" in key for key in changed)
    left = [skipped.node for skipped in made.runs[0].skipped if "not run by these inputs" in skipped.reason]
    assert any("vis" in part for part in left), left


def test_an_image_prunes_both_where_that_is_asked(tmp_path: Path) -> None:
    source, batches = folder("llava", tmp_path / "model"), [with_image("llava", seed) for seed in range(3)]
    only = ["*vision_tower*layers*", "*language_model*layers*"]
    made = sparsify.compile(source, ["wanda:2:4"], calibration=batches, only=only, schedule="dense",
                            output=tmp_path / "out")  # fmt: skip
    pruned = load_file(tmp_path / "out/model.safetensors")
    model = build("llava")
    norms = squared_norms(model, batches)
    checked = 0
    for site in made.runs[0].sites:
        weight = model.get_parameter(site.name + ".weight")
        score = (weight.abs() * norms[site.name].sqrt()).view(-1, 4)
        dropped = torch.zeros_like(score, dtype=torch.bool)
        dropped.scatter_(1, score.argsort(stable=True, dim=1)[:, :2], True)
        stored = pruned[site.sources[0]]
        assert torch.equal(stored == 0, dropped.view_as(stored)), site.name
        checked += "vision" in site.name
    assert checked == 12


def test_an_image_leaves_the_tower_dense_where_nobody_names_it(tmp_path: Path) -> None:
    source = folder("llava", tmp_path / "model")
    made = sparsify.compile(source, ["wanda:2:4"], calibration=[with_image("llava")], output=tmp_path / "out")
    assert not any("vision" in target.parameter for target in made.runs[0].targets)
    reasons = {skipped.reason for skipped in made.runs[0].skipped if "vision_tower.encoder" in skipped.node}
    assert reasons == {"reads pixel_values for the language model; name it with --only to prune it"}


def test_what_does_not_run_cannot_be_asked_for(tmp_path: Path) -> None:
    source = folder("llava", tmp_path)
    with pytest.raises(SpecError, match="vision_tower: not run by these inputs"):
        sparsify.compile(source, ["wanda:2:4"], calibration=[text()], only=["*vision_tower*"])


@pytest.mark.slow
def test_one_graph_is_for_images_of_one_size(tmp_path: Path) -> None:
    source, other = folder("qwen2_vl", tmp_path), with_image("qwen2_vl", 1)
    other["image_grid_thw"] = torch.tensor([[1, 2, 8]])
    with pytest.raises(CalibrationError, match="image_grid_thw of batch 1"):
        sparsify.compile(source, ["wanda:2:4"], calibration=[with_image("qwen2_vl"), other])


def test_a_batch_that_a_model_cannot_place_is_refused(tmp_path: Path) -> None:
    source, batch = folder("qwen2_vl", tmp_path), with_image("qwen2_vl")
    del batch["mm_token_type_ids"]
    with pytest.raises(CalibrationError, match="get_rope_index"):
        sparsify.compile(source, ["wanda:2:4"], calibration=[batch])


@pytest.mark.slow
def test_nothing_is_printed_where_the_first_trace_gives_up(tmp_path: Path, capfd: Any) -> None:
    source = folder("qwen2_vl", tmp_path)
    capfd.readouterr()
    sparsify.compile(source, ["wanda:2:4"], calibration=[with_image("qwen2_vl")], dry_run=True)
    assert capfd.readouterr() == ("", "")


def squared_norms(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Σ x² of the input of every linear layer by its name, by plain hooks."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: found.__setitem__(
                name, found.get(name, 0) + given[0].flatten(0, -2).double().square().sum(0).float()
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found
