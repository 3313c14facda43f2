"""A folder, loaded to be served: its model, its tokenizer, and one token to see that they work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from sparsify.backends.bench.kinds import folder_kind
from sparsify.backends.packed.loaded.loading import load_on
from sparsify.backends.serve.handlers import Held
from sparsify.errors import CheckpointError, SparsifyError, first_line
from sparsify.files.reading import kind_at
from sparsify.frontend.materialize import load
from sparsify.frontend.text_config import text_config
from sparsify.host import is_out_of_memory, quiet

_SIZES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def check_servable(folder: Path) -> str:
    """What kind of folder it is; reads a config and no weight.

    Raises:
        CheckpointError: it is not a folder of a model that torch runs.
    """
    try:
        kind = folder_kind(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"serve {folder}", found=error.found, do="Name a model's folder, or one that compile wrote"
        ) from error
    if kind == "ONNX":
        do = "Serve it with onnxruntime's tools, or the folder that it was made from; sparsify run generates with it"
        raise CheckpointError(f"serve {folder}", found="an ONNX model, which transformers does not run", do=do)
    return kind


def open_held(
    folder: Path, name: str, device: torch.device, *, trust_remote_code: bool = False, check: bool = True
) -> Held:
    """The model of ``folder`` in memory, warm.

    Raises:
        CheckpointError: it does not load, does not write text, or has no tokenizer that can be used.
        BackendError: kernels do not compile.
    """
    kind = check_servable(folder)
    tokenizer = _tokenizer(folder, trust_remote_code)
    if kind == "ragged":
        model: Any = load(folder, trust_remote_code=trust_remote_code, check=check).to(device)
        if kind_at(folder / "generation_config.json") == "file":
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    else:
        model = load_on(folder, device, trust_remote_code=trust_remote_code, check=check)
    config = text_config(model.config)
    if not getattr(model, "can_generate", lambda: False)() or getattr(model.config, "is_encoder_decoder", False):
        what = f"{type(model).__name__}, which does not go on from a text"
        raise CheckpointError(f"serve {folder}", found=what, do="Name a causal language model's folder")
    sizes = (getattr(config, size, None) for size in _SIZES)
    context = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    held = Held(name, model, tokenizer, context, getattr(config, "vocab_size", len(tokenizer)))
    _warm(folder, held)
    return held


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except SparsifyError:
        raise
    except Exception as error:  # whatever broken files make libraries raise
        raise CheckpointError(
            f"serve {folder}",
            found=f"its tokenizer does not load: {first_line(error)}",
            do="Copy the tokenizer's files of the model that it was made from into it",
        ) from error
    if not hasattr(tokenizer, "_tokenizer"):
        raise CheckpointError(
            f"serve {folder}",
            found=f"a tokenizer in Python ({type(tokenizer).__name__}), which cannot decode token by token",
            do="Save the model with a tokenizer.json, as AutoTokenizer of most models does",
        )
    return tokenizer


def _warm(folder: Path, held: Held) -> None:
    """Two tokens, on the thread that will make all others: what is compiled or tuned at first use is so now."""
    model = held.model

    def run() -> None:
        # One that every vocabulary has.
        first = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=2, do_sample=False, num_beams=1)

    try:
        held.worker.submit(run).result()
    except Exception as error:  # models raise whatever they like
        do = "Give --device cpu, or serve a smaller model" if is_out_of_memory(error) else "Check the folder"
        raise CheckpointError(
            f"serve {folder}", found=f"the model generates nothing: {first_line(error)}", do=do
        ) from error


def example(held: Held, address: str) -> str:
    """A line of shell that asks the server something."""
    body: dict[str, Any] = {"model": held.name, "max_tokens": 32}
    if held.tokenizer.chat_template is None:
        way, body["prompt"] = "completions", "Once upon a time"
    else:
        way, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello"}]
    written = json.dumps(body).replace("'", "\\u0027")
    return f"curl {address}/{way} -H 'Content-Type: application/json' -d '{written}'"
