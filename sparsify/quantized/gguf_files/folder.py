"""What lies beside the weights in a GGUF file, as a model folder without weights: config.json and the tokenizer.

transformers reads both (``gguf_file=``); a model that it has no reading of is refused.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import CheckpointError, first_line
from sparsify.files.ownership import Scratch
from sparsify.host import quiet
from sparsify.quantized.dense import library
from sparsify.quantized.gguf_files.header import Header

# Widths that transformers leaves at the defaults of its config classes: by their names after the architecture's.
_WIDTHS = {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
_ARCHITECTURE, _TOKENS = "general.architecture", "tokenizer.ggml.tokens"
# Rotary frequencies of long contexts, which transformers does not take from a GGUF file.
ROPE = "rope_freqs.weight"


def make_folder(header: Header, to: torch.dtype) -> tuple[Scratch, Path]:
    """A temporary folder (keep its owner as long as it is read) with what transformers makes of the file's metadata.

    Args:
        to: the dtype of the weights, for the config.

    Raises:
        CheckpointError: the gguf package is missing, or a model that transformers does not read from GGUF.
    """
    asked = f"file {header.path}"
    library("gguf", "gguf", asked)
    owner = Scratch("sparsify-gguf")
    # A folder of the usual mode, which the output's follows.
    folder = Path(owner.name) / "model"
    folder.mkdir()
    try:
        config = _config(header, asked)
        config.dtype = to
        config.save_pretrained(folder)
        if _TOKENS in header.metadata:
            _save_tokenizer(header, folder)
    except BaseException:
        owner.cleanup()
        raise
    if ROPE in header.tensors:
        warnings.warn(
            f"{header.path.name} holds {ROPE}, which transformers does not read from a GGUF file: past the length that "
            "the model was first trained for, its positions are not scaled. Take them from the original config.json "
            "(rope_parameters)",
            stacklevel=2,
        )
    return owner, folder


def _config(header: Header, asked: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    architecture = header.metadata.get(_ARCHITECTURE)
    do = "Take the model from before it became a GGUF file"
    try:
        with quiet():
            config = AutoConfig.from_pretrained(header.path.parent, gguf_file=header.path.name, local_files_only=True)
    except Exception as error:  # of many kinds
        raise CheckpointError(
            asked, found=f"transformers does not read {architecture!r} from it ({first_line(error)})", do=do
        ) from error
    if not config.architectures:
        tables = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
        names = [table[config.model_type] for table in tables if config.model_type in table]
        if not names:
            raise CheckpointError(asked, found=f"no language model in it, but {config.model_type!r}", do=do)
        config.architectures = [names[0]]
    for key, width in _WIDTHS.items():
        value = header.metadata.get(f"{architecture}.{key}")
        if type(value) is int and hasattr(config, width):
            setattr(config, width, value)
    return config


def _save_tokenizer(header: Header, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                header.path.parent, gguf_file=header.path.name, local_files_only=True
            )
            tokenizer.save_pretrained(folder)
    except Exception as error:  # of many kinds, the tokenizers library's own among them
        warnings.warn(
            f"transformers makes no tokenizer of {header.path.name} ({first_line(error)}); give data as token ids, and "
            "add the model's own tokenizer files to the output",
            stacklevel=2,
        )
