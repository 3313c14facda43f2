"""Checkpoints as compressed-tensors 0.9.4 itself wrote them: its classes run where that version alone is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized import store
from support.serving_vllm import Pruned, generated, half, model, tokens_of, two_of_four

from sparsify.files.ledger import Ledger
from sparsify.quantized.recognise import open_checkpoint

# `make vllm` lays it there, beside the newer one that vLLM asks for.
OLD = Path(sys.prefix) / "old"
WRITER = """
import json, sys
from pathlib import Path
import compressed_tensors
from compressed_tensors import ModelCompressor
from compressed_tensors.config import SparsityCompressionConfig
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

assert compressed_tensors.__version__ == "0.9.4", compressed_tensors.__file__
source, target, form, said = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source)
zeros = quantized = None
if form != "marlin-24":
    structure = "2:4" if "24" in form else "unstructured"
    zeros = SparsityCompressionConfig.load_from_registry(
        form, targets=["Linear"], ignore=["lm_head"], sparsity_structure=structure, global_sparsity=0.5
    )
if said:
    quantized = QuantizationConfig.model_validate(json.loads(said))
    apply_quantization_config(model, quantized)
    for module in model.modules():
        if getattr(module, "weight_scale", None) is not None:
            args = module.quantization_scheme.weights
            most = 448 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
            parts = module.weight.data.unflatten(1, (-1, args.group_size or module.weight.shape[1]))
            module.weight_scale.data = (parts.abs().amax(-1) / most).clamp(min=1e-6).to(module.weight_scale.dtype)
writer = ModelCompressor(zeros, quantized)
state = writer.compress(model)
model.config.save_pretrained(target)
save_file({name: t.contiguous() for name, t in state.items()}, Path(target) / "model.safetensors", {"format": "pt"})
writer.update_config(target)
"""


def weights(form: str, **more: Any) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False} | more
    group = {"targets": ["Linear"], "weights": args}
    said = {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "format": form}
    return said | {"quant_method": "compressed-tensors", "quantization_status": "frozen"}


# The format, how weights are pruned, what is quantized, and how far that may take a weight of the largest of its row.
WRITTEN: dict[str, tuple[str, Pruned, dict[str, Any] | None, float]] = {
    "2:4": ("sparse-24-bitmask", two_of_four, None, 0.0),
    "2:4 of int8": ("sparse-24-bitmask", two_of_four, weights("int-quantized"), 0.51 / 127),
    "marlin-24": ("marlin-24", two_of_four, weights("marlin-24", num_bits=4), 0.51 / 7),
    "other zeros": ("sparse-bitmask", half, None, 0.0),
    "other zeros of fp8": ("sparse-bitmask", half, weights("float-quantized", type="float"), 2.0**-4),
}


@pytest.mark.skipif(not OLD.exists(), reason="compressed-tensors 0.9.4 is not there: make vllm")
@pytest.mark.parametrize("case", WRITTEN)
def test_what_it_wrote_is_imported_and_served(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    form, pruned, said, most = WRITTEN[case]
    made = model("llama", {"proj": pruned})
    made = made.half() if form == "marlin-24" else made
    made.save_pretrained(tmp_path / "dense")
    folder, given = tmp_path / "old", json.dumps(said) if said else ""
    words = [sys.executable, "-c", WRITER, tmp_path / "dense", folder, form, given]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(OLD)})
    assert done.returncode == 0, done.stderr
    read = open_checkpoint(folder, Ledger.of(folder), torch.float32)
    found = {name: read.read(name) for name in read.names()}
    for name, weight in made.state_dict().items():
        got, want = found[name].float(), weight.float()
        assert torch.equal(got, want) if "proj.weight" not in name or not most else ((got == 0) >= (want == 0)).all()
        assert ((got - want).abs() <= most * want.abs().amax(-1, keepdim=True)).all(), name
    store(tmp_path / "dense", found)
    want_tokens = generated(tmp_path / "dense")
    llm = request.getfixturevalue("engine")(folder)
    assert tokens_of(llm) == want_tokens
