"""How a folder is loaded, for its card: by what its config.json and its manifest say it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.provenance.markdown import block

_RUN = "`FOLDER` is where this file lies."


@dataclass(frozen=True)
class Kind:
    """What a folder is.

    Attributes:
        form: in words, where it is no ordinary checkpoint. library: that loads it, by its name on the hub.
        tags: beside those of all. loading: paragraphs of Markdown.
    """

    form: str
    library: str | None
    tags: Sequence[str]
    loading: Sequence[str]

    def what(self, pruned: bool) -> str:
        """``pruned, packed``."""
        said = [*(["pruned"] if pruned else []), *([self.form] if self.form else [])]
        return ", ".join(said) or "written by sparsify"


def kind_of(folder: Path, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> Kind:
    """What the finished ``folder`` is."""
    loader = _loader(config)
    plain = [f"from transformers import {loader}", "", f'model = {loader}.from_pretrained("FOLDER")']
    quantization = config.get("quantization_config")
    packed = quantization if isinstance(quantization, dict) and quantization.get("quant_method") == "sparsify" else None
    if (folder / "adapter_config.json").is_file():
        lines = ["from peft import AutoPeftModelForCausalLM", ""]
        lines += ['model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")']
        return Kind("a LoRA adapter of it", "peft", ("lora",), (block(lines, "python"), _RUN))
    if "onnx" in manifest:
        return _onnx(manifest["onnx"], plain if config and (folder / "model.safetensors").exists() else None)
    if packed is not None:
        place = ', device_map="cuda"' if "gpu" in packed else ""
        lines = ["import sparsify  # pip install sparsify-fx: teaches transformers to load packed weights"]
        lines += [plain[0], "", f'model = {loader}.from_pretrained("FOLDER"{place})']
        dense = "`sparsify unpack FOLDER -o OUT` makes an ordinary checkpoint of it, bit for bit."
        form = "packed for GPUs" if "gpu" in packed else "packed"
        return Kind(form, "transformers", ("packed",), (block(lines, "python"), f"{_RUN} {dense}"))
    if any(record.get("ragged") for record in manifest.get("structure", ())):
        lines = ["import sparsify", "", 'model = sparsify.load("FOLDER")']
        why = "Its layers differ in width: transformers and other loaders refuse it."
        return Kind("", "sparsify", ("ragged",), (block(lines, "python"), f"{_RUN} {why}"))
    if not config:
        lines = ["from safetensors.torch import load_file", "", 'state = load_file("FOLDER/model.safetensors")']
        why = "It is the state of a module of PyTorch: `module.load_state_dict(state)`."
        return Kind("", "pytorch", (), (block(lines, "python"), f"{_RUN} {why}"))
    alike = "It loads with no code of ours; zeros are stored as numbers."
    return Kind("", "transformers", (), (block(plain, "python"), f"{_RUN} {alike}"))


def _onnx(said: Mapping[str, Any], plain: list[str] | None) -> Kind:
    lines = ["import onnxruntime", ""]
    if said.get("weights") == "sparse":
        lines += [
            "options = onnxruntime.SessionOptions()",
            'options.register_custom_ops_library("FOLDER/libsparsify_onnx.so")  # or sparsify.onnx_library()',
            'session = onnxruntime.InferenceSession("FOLDER/model.onnx", options)',
        ]
        more = [
            "Without that library it opens as well, slower and at dense speed, and nothing is said of it. "
            "onnxruntime-genai registers it by itself."
        ]
    else:
        lines.append('session = onnxruntime.InferenceSession("FOLDER/model.onnx")')
        more = []
    parts = [block(lines, "python"), _RUN, *more]
    if said.get("kind") in ("decoder", "step", "uncached"):
        parts.append("`sparsify run FOLDER TEXT` generates with it.")
    if said.get("weights") == "packed":
        parts.append("Its weights are packed; `sparsify expand FOLDER -o OUT` makes them dense.")
    if plain is not None:
        parts += ["The weights are in the safetensors beside the graph, and transformers loads those:"]
        parts += [block(plain, "python")]
    return Kind("as ONNX", "onnx", ("onnx",), parts)


def _loader(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads the model: Auto classes know those that are not its own, too."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "AutoModelForCausalLM"
    return name if name.isidentifier() and name.isascii() else "AutoModel"
