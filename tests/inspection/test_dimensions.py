"""``inspect --dimensions``: the coupled dimensions of a model for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from support.command_line import sparsify


def test_sentences_json_and_a_graph(folder: Callable[[str], Path], tmp_path: Path) -> None:
    words = ("inspect", folder("llama"), "--dimensions")
    text = sparsify(*words).stdout
    assert "2 heads: model.layers.0.self_attn.q_proj outputs (16 each), " in text
    assert "64 channels: model.layers.0.mlp.gate_proj outputs, model.layers.0.mlp.up_proj outputs, " in text
    assert "32 channels of the residual width" in text and "pinned: lm_head outputs: the model returns it" in text
    done = sparsify(*words, "--json", "--dot", tmp_path / "d.dot")
    groups = json.loads(done.stdout)["groups"]
    heads_ = next(g for g in groups if g["kind"] == "heads")
    assert heads_["free"] == 2 and heads_["members"][0]["channel"][:17] == [0] * 16 + [1]
    assert (tmp_path / "d.dot").read_text().startswith("graph dimensions {")
