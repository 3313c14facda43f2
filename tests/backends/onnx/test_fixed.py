"""Models of which an input's numbers decide the sizes (the grid of an image's patches): a graph for these numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.kinds import needs_type

import sparsify
from sparsify.backends.onnx.running.session import open_session
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.files.manifest import read_manifest

SIZES = {"hidden_size": 32, "num_heads": 4, "patch_size": 8, "depth": 2, "intermediate_size": 64, "out_hidden_size": 32}
GRID = {"grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])}
# A convolution without a bias; a table read by numbers that a loop adds up, and frames that are counted.
BUILD: dict[str, tuple[Callable[[], Any], str, tuple[int, ...]]] = {
    "qwen2.5": (lambda: hf.AutoModel.from_config(hf.AutoConfig.for_model(
        "qwen2_5_vl_vision", **SIZES, fullatt_block_indexes=[1])), "hidden_states", (24, 384)),
    "kimi": (lambda: hf.AutoModel.from_config(hf.AutoConfig.for_model(
        "kimi_k25_vision", patch_size=8, pos_emb_height=8, pos_emb_width=8, num_attention_heads=4, hidden_size=32,
        num_hidden_layers=2, intermediate_size=64)), "pixel_values", (24, 3, 8, 8)),
}  # fmt: skip
# Sound, upsampled and padded by what buffers say.
DECODER = {
    "num_filters": 4, "hidden_size": 32, "upsample_groups": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64,
}  # fmt: skip


@pytest.mark.slow
@needs_type("mimi_decoder")
def test_what_runs_at_no_other_length_keeps_that_of_calibration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(hf.AutoConfig.for_model("mimi_decoder", **DECODER)).eval()
    model.save_pretrained(tmp_path / "dense")
    batch = {"latents": torch.zeros(2, 32, 6)}
    result = sparsify.compile(tmp_path / "dense", calibration=[batch], to="onnx", output=tmp_path / "out", device="cpu")
    assert any("as long as those of calibration" in note for note in result.notes), result.notes
    checked = verify_onnx(tmp_path / "out")
    assert checked.sound and checked.behaviour is not None, checked.problems


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5", "kimi"])
def test_a_graph_is_made_for_one_grid(name: str, tmp_path: Path) -> None:
    build, pixels, shape = BUILD[name]
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(tmp_path / "dense")
    batch = {pixels: torch.randn(shape), **GRID}
    result = sparsify.compile(
        tmp_path / "dense", ["magnitude:50%"], calibration=[batch], to="onnx", output=tmp_path / "out", device="cpu"
    )
    said = read_manifest(tmp_path / "out")["onnx"]
    assert said["fixed"] == {"grid_thw": GRID["grid_thw"].tolist()} and said["inputs"] == [pixels]
    assert any("made for grid_thw [[1, 4, 4], [1, 2, 4]] alone" in note for note in result.notes), result.notes
    checked = verify_onnx(tmp_path / "out")
    assert checked.sound and checked.behaviour is not None, checked.problems
    session = open_session(tmp_path / "out" / "model.onnx")
    # Its outputs are those of the pruned model, on numbers that it was not traced with.
    pruned = dict(model.named_parameters())
    with torch.no_grad():
        for run in result.runs:
            for site in run.sites:
                pruned[site.parameter].copy_(result.weight(site.parameter))
        want = model(**(other := {pixels: torch.randn(shape), **GRID}))[0]
    (got, *_) = session.run(["last_hidden_state"], {pixels: other[pixels].numpy()})
    assert float((torch.from_numpy(got) - want).abs().max()) <= 1e-4
