"""What transformers computes when it loads a folder, and no file holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import sparsify
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.frontend.skeleton import build_skeleton

MARIAN = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64, "decoder_vocab_size": 64,
    "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip


def marian(folder: Path) -> hf.MarianMTModel:
    torch.manual_seed(0)
    model = hf.MarianMTModel(hf.MarianConfig(**MARIAN)).eval()
    model.save_pretrained(folder)
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "decoder_input_ids": ids}


def test_positions_that_are_a_formula(tmp_path: Path) -> None:
    """MarianMT's positions are parameters that nobody saves."""
    model = marian(tmp_path / "model")
    loaded = sparsify.load(tmp_path / "model")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    made = sparsify.compile(tmp_path / "model", ["wanda:2:4"], calibration=[batch()], output=tmp_path / "out")
    assert len(made.runs[0].targets) == 32
    pruned = hf.MarianMTModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        wanted = pruned(**batch(), use_cache=False).logits
        assert torch.allclose(made.model(**batch(), use_cache=False).logits, wanted, atol=1e-6)


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize("to", ["packed:choice=smallest", pytest.param("onnx", marks=pytest.mark.slow)])
def test_the_formula_reaches_every_output(to: str, tmp_path: Path) -> None:
    marian(tmp_path / "model")
    out = tmp_path / "out"
    sparsify.compile(tmp_path / "model", ["magnitude:2:4"], calibration=[batch()], to=to, output=out)
    if to == "onnx":
        assert verify_onnx(out).sound
        return
    same = hf.MarianMTModel.from_pretrained(out).eval()
    dense = sparsify.load(out)
    with torch.no_grad():
        assert torch.allclose(same(**batch()).logits, dense(**batch()).logits, atol=1e-5)


def test_falcon_h1s_multipliers(tmp_path: Path) -> None:
    """A parent fills what a child holds."""
    config = hf.FalconH1Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=64, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        mamba_chunk_size=8, ssm_multipliers=[0.5, 0.25, 2.0, 1.0, 3.0],
    )  # fmt: skip
    model = hf.FalconH1ForCausalLM(config)
    model.save_pretrained(tmp_path)
    real, found = dict(model.named_buffers()), dict(build_skeleton(tmp_path).named_buffers())
    vectors = [name for name in real if name.endswith("mup_vector")]
    assert vectors and all(torch.equal(real[name], found[name]) for name in vectors)
