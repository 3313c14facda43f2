"""What is made of a quantized model: an ordinary folder in the dtype asked for, by every backend and every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from support import quantized
from support.command_line import sparsify as run
from support.folders import SMALLEST
from support.quantized import change_config, dense_folder, tensors_of

import sparsify
from sparsify.backends.hf import job
from sparsify.backends.onnx import export_onnx
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.errors import SpecError
from sparsify.files.writer import write_all
from sparsify.frontend.source import open_source
from sparsify.quantized.store import QuantizedStore

IDS = [torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))]
NO_FILES = {"hf_quant_config.json", "quantize_config.json", "quant_config.json"}


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized.gptq(tmp_path_factory.mktemp("model") / "gptq", said=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_ordinary_folder(dtype: str, gptq: Path, tmp_path: Path) -> None:
    told: list[str] = []
    made = sparsify.compile(
        gptq, ["wanda:2:4"], calibration=IDS, output=tmp_path / "out", dtype=dtype, tell=told.append
    )
    to = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert model.dtype == to and config["dtype"] == dtype and "quantization_config" not in config
    assert not NO_FILES & {path.name for path in (tmp_path / "out").iterdir()}
    dense, written = open_source(gptq, dtype=dtype).weights, tensors_of(tmp_path / "out")
    assert sorted(written) == sorted(dense.parameters())
    for name, tensor in written.items():
        assert tensor.dtype == to
        kept = tensor != 0 if "proj" in name else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[kept], dense.read(name)[kept]), name
        assert "proj" not in name or kept.reshape(-1, 4).sum(1).max() <= 2
    stored = sum(path.stat().st_size for path in gptq.glob("*.safetensors"))
    bytes_ = sum(t.numel() * t.element_size() for t in written.values())
    found = {"method": "gptq", "dtype": dtype, "stored_bytes": stored, "dense_bytes": bytes_}
    assert made.manifest["quantized_source"] == found
    assert len(told) == 1 and "gptq is quantized (gptq, " in told[0] and dtype in told[0]


FORMATS: dict[str, Any] = {
    "modelopt": quantized.modelopt_fp8,
    "fp8 of experts": lambda folder: quantized.block_fp8(folder, family="deepseek_v3"),
    "mxfp4": quantized.mxfp4,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_shards_of_the_output_and_their_index(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "write_all", lambda folder, tensors, read: write_all(folder, tensors, read, 20_000))
    folder = FORMATS[kind](tmp_path / "model")
    sparsify.compile(folder, ["magnitude:50%"], output=tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = open_source(folder).weights
    for name, parameter in model.named_parameters():
        want = dense.read(name)
        same = (parameter == want) | (parameter == 0)
        # (A router is run in float32 by its class.)
        assert parameter.dtype == torch.bfloat16 or "mlp.gate." in name
        assert same.all(), name
    zeros = [(p == 0).float().mean() for n, p in model.named_parameters() if n.endswith("down_proj")]
    assert all(share >= 0.49 for share in zeros)


def test_what_is_dense_stays_as_it_is_stored(tmp_path: Path) -> None:
    """Floats of 32 bits beside quantized weights are what their publisher did not round."""
    folder = quantized.block_fp8(tmp_path / "model", family="deepseek_v3")
    stored = tensors_of(folder)
    (bias,) = [name for name in stored if name.endswith("e_score_correction_bias")]
    stored[bias] = torch.rand_like(stored[bias].float())
    quantized.store(folder, stored)
    sparsify.compile(folder, ["magnitude:50%"], output=tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[bias], stored[bias])


def test_packed(gptq: Path, tmp_path: Path) -> None:
    hf = sparsify.compile(gptq, ["wanda:2:4"], calibration=IDS, output=tmp_path / "hf").model
    with torch.no_grad():
        want = hf(input_ids=IDS[0], use_cache=False).logits
    sparsify.compile(gptq, ["wanda:2:4"], calibration=IDS, output=tmp_path / "packed", to=SMALLEST)
    assert json.loads((tmp_path / "packed" / "sparsify.json").read_text())["quantized_source"]["method"] == "gptq"
    with torch.no_grad():
        got = sparsify.load(tmp_path / "packed")(input_ids=IDS[0], use_cache=False).logits
    assert torch.allclose(got.float(), want.float(), atol=2e-2)


@pytest.mark.slow
def test_onnx(gptq: Path, tmp_path: Path) -> None:
    for name, to in {"onnx": "onnx", "external": "onnx:weights=external"}.items():
        made = sparsify.compile(gptq, ["wanda:2:4"], calibration=IDS, output=tmp_path / name, to=to)
        assert made.manifest["quantized_source"]["method"] == "gptq"
    assert sorted(tensors_of(tmp_path / "onnx")) == sorted(open_source(gptq).weights.parameters())
    assert verify_onnx(tmp_path / "external").sound
    # A model without a pass, compared with what it was made of.
    export_onnx(gptq, tmp_path / "dense", weights="external")
    result = verify_onnx(tmp_path / "dense", against=gptq)
    assert result.sound and result.compared > 14


def test_smaller_and_the_plan_of_it(gptq: Path, tmp_path: Path) -> None:
    planned = sparsify.compile(gptq, ["llm-pruner:25%"], dry_run=True, output=tmp_path / "out")
    assert planned.structure and not (tmp_path / "out").exists()
    made = sparsify.compile(gptq, ["llm-pruner:25%", "wanda:2:4"], calibration=IDS, output=tmp_path / "out")
    assert not NO_FILES & {path.name for path in (tmp_path / "out").iterdir()}
    assert made.manifest["quantized_source"]["method"] == "gptq"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.num_parameters() < 22_688


@pytest.mark.slow
def test_every_command(gptq: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.arange(400) % 57 + 3}, ids)
    text = ("--data", ids, "--sequence-length", 16)
    commands = {
        "eval": ("eval", gptq, *text, "--json"),
        "inspect": ("inspect", gptq, "--json"),
        "graph": ("inspect", gptq, "--graph"),
        "compare": ("compare", gptq, "--passes", "magnitude:2:4", "--calibration", ids, *text, "--json"),
        "tune": ("tune", gptq, *text, "-o", tmp_path / "tuned", "--steps", 1, "--batch", 2, "--micro", 2, "--json"),
        "verify": ("verify", gptq, "--json"),
        "self": ("compile", gptq, "--pass", "wanda:2:4", "--calibration", "self", "--samples", 1, *text[2:],
                 "-o", tmp_path / "out"),
    }  # fmt: skip
    for name, words in commands.items():
        told = run(*words)
        assert told.returncode == 0, (name, told.stderr, told.stdout)
    assert json.loads((tmp_path / "tuned" / "config.json").read_text()).get("quantization_config") is None


def test_dtype_of_what_is_not_quantized_is_refused(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "model")
    with pytest.raises(SpecError, match="weights that are not quantized, in bfloat16"):
        sparsify.compile(folder, ["magnitude:50%"], dtype="float16")
    with pytest.raises(SpecError, match="not quantized, in float32"):
        sparsify.compile(torch.nn.Linear(4, 4), ["magnitude:50%"], dtype="float16")
    # Its own may be named.
    sparsify.compile(folder, ["magnitude:50%"], dtype="bfloat16", output=tmp_path / "out")
    with pytest.raises(SpecError, match="dtype 'float8'"):
        sparsify.compile(folder, ["magnitude:50%"], dtype="float8")


LEFT_OVER: dict[str, dict[str, Any]] = {
    "sparsity alone": {
        "quant_method": "compressed-tensors", "format": "dense",
        "sparsity_config": {"format": "dense", "sparsity_structure": "2:4"},
    },
    "a method that no weight is in": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT_OVER)
def test_a_config_that_is_left_over_is_no_quantization(kind: str, tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "model")
    sparsify.compile(folder, ["magnitude:50%"], output=tmp_path / "want")
    change_config(folder, quantization_config=LEFT_OVER[kind])
    made = sparsify.compile(folder, ["magnitude:50%"], output=tmp_path / "out")
    assert "quantized_source" not in made.manifest
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("want", "out")]
    assert weights[0] == weights[1]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("want", "out")]
    assert configs[0] == configs[1]


def test_an_old_output_of_a_plain_copy_has_the_same_bytes(tmp_path: Path) -> None:
    """A packed source is written anew too, in the order of safetensors' own writer."""
    folder = dense_folder(tmp_path / "model")
    sparsify.compile(folder, ["magnitude:2:4"], output=tmp_path / "packed", to=SMALLEST)
    sparsify.compile(tmp_path / "packed", ["magnitude:2:4"], output=tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = tensors_of(tmp_path / "out")
    with safe_open(file, "pt") as opened:
        save_file(tensors, tmp_path / "again.safetensors", metadata=opened.metadata())
    assert file.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the output is laid out no two dense tensors are alive."""
    folder = quantized.gptq(tmp_path / "model")
    alive: list[int] = []
    count = 0
    read = QuantizedStore.read

    class Counted:
        def __init__(self) -> None:
            nonlocal count
            count += 1
            alive.append(count)

        def __del__(self) -> None:
            nonlocal count
            count -= 1

    def counted(self: QuantizedStore, name: str) -> torch.Tensor:
        tensor = read(self, name)
        tensor.held_by = Counted()  # type: ignore[attr-defined]
        return tensor

    monkeypatch.setattr(QuantizedStore, "read", counted)
    sparsify.compile(folder, ["magnitude:2:4"], output=tmp_path / "out")
    assert len(alive) >= 21 and max(alive) <= 2
