"""What a user names as the model: a folder, a hub id, or a module in memory.

A folder's model is built from its config without memory for its parameters, so opening one is cheap however large.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from sparsify.context import Progress, report
from sparsify.errors import CheckpointError, SpecError, TraceError, first_line
from sparsify.files.checkpoint import WEIGHTS, Checkpoint
from sparsify.files.companions import (
    check_companions,
    copy_companions,
    left_out,
    rewrite_config,
    tokenizer_files,
)
from sparsify.files.ledger import Checked, Ledger
from sparsify.files.reading import MAX_INDEX, admit, kind_at
from sparsify.finite import check_all_finite, check_finite
from sparsify.frontend.adapter import Adapter, find_adapter, merged
from sparsify.frontend.matching import weights_of_checkpoint, weights_of_module
from sparsify.frontend.modules import unwrapped, without_wrappers
from sparsify.frontend.skeleton import build_skeleton, recast
from sparsify.frontend.stores import find_folder, open_store, pickles, read_for, read_pickles
from sparsify.frontend.text_config import text_config
from sparsify.frontend.ties import separate, untie
from sparsify.ir.store import DenseView, TensorStore
from sparsify.ir.weights import Weights
from sparsify.quantized.gguf_files.header import read_header
from sparsify.quantized.gguf_files.store import GgufFile
from sparsify.words import WEIGHT_DTYPE, check_adapter, check_compute_dtype, check_weight_dtype


@dataclass
class Source:
    """An opened model: its structure, its parameters, and where it came from.

    ``module`` is a skeleton (see :func:`build_skeleton`) for a folder and the user's own for a module; ``folder`` is
    None for a module in memory. ``ledger``: what the folder says of its bytes; ``checked``: by what those that the user
    named were checked (a model that was made smaller lies in a folder of its own). ``compute``: the dtype in which it
    runs; None: its own. ``allow_nan``: whether NaN and infinity in its tensors pass. ``left_out``: what of the
    folder no output carries. ``adapter``: what was merged into the weights; a tokenizer beside it is the model's.
    ``given_tokenizer``: one that a user gave, in place of the folder's; a module in memory has no other.
    ``quantization``: of a quantized model its format, the dtype that it is read in, and bytes stored and dense.
    ``hub``: the id that a model of the hub was named by.
    """

    name: str
    module: nn.Module
    weights: Weights
    folder: Path | None = None
    checkpoint: Checkpoint | None = None
    trust_remote_code: bool = False
    ledger: Ledger = field(default_factory=Ledger, repr=False)
    checked: Checked = "none"
    compute: torch.dtype | None = None
    allow_nan: bool = False
    left_out: tuple[str, ...] = ()
    adapter: Adapter | None = None
    quantization: Mapping[str, Any] | None = None
    given_tokenizer: Any = field(default=None, repr=False)
    hub: str | None = None
    _tokenizer: Any = field(default=None, repr=False)
    # Of all weights, once somebody has asked for it.
    digest: str | None = field(default=None, init=False, repr=False)

    @property
    def config(self) -> Any:
        """The Hugging Face config, or None for any other module."""
        return getattr(self.module, "config", None)

    @property
    def is_transformers(self) -> bool:
        return _is_transformers(self.module)

    @property
    def context_length(self) -> int | None:
        text = text_config(self.config)
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(value := getattr(text, key, None), int) and value > 0:
                return value
        return None

    @property
    def vocab_size(self) -> int | None:
        return getattr(text_config(self.config), "vocab_size", None)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in, as far as it is one dtype."""
        if self.compute is not None:
            return self.compute
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def skeleton(self, edit: Callable[[nn.Module], None] = lambda model: None) -> nn.Module:
        """The folder's model once more, without memory for its parameters; see :func:`build_skeleton`."""
        assert self.folder is not None, "a module in memory is its own"
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)

        def change(model: nn.Module) -> None:
            separate(model, self.weights.untied)
            edit(model)

        return build_skeleton(self.folder, self.trust_remote_code, dtype, change, self.weights.store, like=self.module)

    def copy_beside(self, into: Path) -> None:
        """Copy what lies beside the folder's weights into the folder ``into``, saying what the dense model's says."""
        assert self.folder is not None, "a module in memory has nothing beside it"
        store = self.weights.store
        copy_companions(self.folder, into)
        if isinstance(store, DenseView):
            rewrite_config(into, store.dense_config)
        for name in getattr(store, "left_out", ()):
            (into / name).unlink(missing_ok=True)
        if self.adapter is not None:
            for path in tokenizer_files(self.adapter.folder, beside=True):
                shutil.copyfile(admit(path), into / path.name)

    def running(self) -> nn.Module:
        """The model in the dtype in which it runs, for a trace: ``module`` itself where that is its own."""
        if self.compute is None:
            return self.module
        if self.folder is None:
            return recast(self.module, self.compute)
        return build_skeleton(
            self.folder,
            self.trust_remote_code,
            edit=lambda model: separate(model, self.weights.untied),
            store=self.weights.store,
            compute=self.compute,
            like=self.module,
        )

    @property
    def _holds_all(self) -> bool:
        """Whether the model is one file, whose folder is nobody's."""
        return (self.quantization or {}).get("method") == "gguf"

    def tokenizer(self) -> Any:
        """The tokenizer that was given, else the folder's.

        Raises:
            CheckpointError: there is none.
        """
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            if self.folder is None:
                raise CheckpointError(
                    f"a tokenizer for {self.name}",
                    found="a module in memory, which has none",
                    do="Give it with tokenizer=, or token ids (LongTensors [batch, sequence]) in place of text",
                )
            place = self.folder
            if self.adapter is not None and tokenizer_files(self.adapter.folder):
                place = self.adapter.folder
            files = tokenizer_files(place)
            for path in files:
                if (size := path.stat().st_size) > MAX_INDEX:
                    raise CheckpointError(
                        f"{path}", found=f"{size} bytes, more than {MAX_INDEX}", do="Is it what its name says?"
                    )
            if not files:
                # transformers would make an empty one up from the config.
                raise CheckpointError(
                    f"a tokenizer for {self.name}",
                    found=f"no tokenizer {'of a kind that is known in it' if self._holds_all else f'files in {place}'}",
                    do="Add them, or give token ids in a .safetensors file",
                )
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    place, trust_remote_code=self.trust_remote_code, local_files_only=True
                )
            except Exception as error:  # of many kinds, the tokenizers library's own among them
                raise CheckpointError(
                    f"a tokenizer for {self.name}",
                    found=f"none that loads{'' if self._holds_all else f' in {place}'} ({first_line(error)})",
                    do="Add its tokenizer files, or give token ids in a .safetensors file",
                ) from error
        return self._tokenizer


def check_tokenizer(tokenizer: object) -> None:
    """Raises:
    SpecError: a name, say, where a tokenizer is meant.
    """
    if tokenizer is not None and not callable(tokenizer):
        found = f"{type(tokenizer).__name__}, no tokenizer"
        raise SpecError(f"tokenizer {tokenizer!r}", found=found, do="Give AutoTokenizer.from_pretrained(folder)")


def open_source(
    model: str | Path | nn.Module,
    *,
    allow_bin: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
    allow_nan: bool = False,
    compute_dtype: str | torch.dtype | None = None,
    strict: bool = False,
    adapter: str | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: Any = None,
) -> Source:
    """Open ``model`` without reading its weights.

    Args:
        model: a local Hugging Face folder, a hub id, a GGUF file, or a module.
        allow_bin: read ``pytorch_model.bin`` (with ``weights_only=True``) where there is no safetensors.
        trust_remote_code: run Python that the folder brings along.
        check: hold files now, and tensors when they are read, against the folder's ``sparsify.json``.
        allow_nan: let NaN and infinity pass; else a folder's tensors are looked at when they are read or copied, those
            of a module now.
        compute_dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"`` (torch's own as well): what the model is to run
            in; None: its own. What is stored keeps its dtype.
        strict: refuse tensors that the model's class has no place for; else outputs carry them over.
        adapter: ``"merge"``: what is to become of a LoRA adapter of peft in the folder, or that the folder is; None
            refuses it.
        dtype: of the same three, what the weights of a quantized model are read in; None: bfloat16.
        tokenizer: in place of the folder's own; that of a module in memory.

    Raises:
        CheckpointError: no such model, a broken one, one whose bytes are not those that were written, or NaN in it.
        SpecError: an empty name; a dtype that is none, or one for a model whose weights are stored in another and not
            quantized.
    """
    asked = None if compute_dtype is None else check_compute_dtype(str(compute_dtype).removeprefix("torch."))
    compute: torch.dtype | None = None if asked is None else getattr(torch, asked)
    check_adapter(adapter)
    word = None if dtype is None else check_weight_dtype(str(dtype).removeprefix("torch."))
    to: torch.dtype = getattr(torch, word or WEIGHT_DTYPE)
    if not isinstance(model, str | Path | nn.Module):
        found = f"{type(model).__name__}, which names no model and is none"
        raise SpecError("a model", found=found, do="Give a folder, a hub id, a GGUF file or a torch module")
    check_tokenizer(tokenizer)
    if isinstance(model, str) and not model.strip():
        # As a path it would be the folder that we are in.
        raise SpecError("a model", found="an empty name", do="Name a folder, a hub id or a GGUF file")
    report(Progress("loading", what=type(model).__name__ if isinstance(model, nn.Module) else str(model)))
    if isinstance(model, nn.Module):
        if adapter is not None:
            raise SpecError("--adapter merge", found="a module in memory", do="Give what merge_and_unload() returns")
        model = unwrapped(model)
        if not allow_nan:
            _check_module(model)
        weights = weights_of_module(model)
        _check_dtype(type(model).__name__, word, {p.dtype for p in model.parameters()})
        return Source(
            type(model).__name__.lower(),
            model,
            weights,
            compute=compute,
            allow_nan=allow_nan,
            given_tokenizer=tokenizer,
        )
    folder = find_folder(model)
    if folder.suffix.lower() == ".gguf" and kind_at(folder) == "file":
        return replace(_open_gguf(folder, to, compute, allow_nan=allow_nan), given_tokenizer=tokenizer)
    if not folder.is_dir():
        raise CheckpointError(f"model folder {folder}", found="a file", do="Name the folder that holds config.json")
    # The hub's cache names a folder by its commit; the model's own name serves outputs better.
    name = folder.name if kind_at(model) else str(model).rpartition("/")[2]
    ledger = Ledger.of(folder, check, finite=not allow_nan)
    check_companions(folder, ledger)
    own, addition = find_adapter(folder, adapter, find_folder, check, allow_nan)
    if own != folder:
        folder, ledger = own, Ledger.of(own, check, finite=not allow_nan)
        check_companions(folder, ledger)
    store: TensorStore
    if allow_bin and not (folder / WEIGHTS).exists() and pickles(folder):
        store = pickled = read_pickles(folder)
        if not allow_nan:
            check_all_finite(pickled.tensors, str(folder))
    else:
        store = without_wrappers(open_store(folder, ledger, to if word else None))
    quantization = getattr(getattr(store, "base", store), "quantization", None)
    stored = [d for name in store.names() if (d := store.dtype(name)).is_floating_point]
    if quantization is None:
        _check_dtype(str(folder), word, set(stored))
    module = build_skeleton(folder, trust_remote_code, next(iter(stored), None), store=store)
    if addition is not None:
        store = merged(addition, module, store)
    weights = weights_of_checkpoint(module, store, untied=untie(module, store), strict=strict)
    checkpoint = store if isinstance(store, Checkpoint) else None
    return Source(
        name,
        module,
        weights,
        folder,
        checkpoint,
        trust_remote_code,
        ledger,
        ledger.checked,
        compute,
        allow_nan,
        tuple(left_out(folder, read_for(store))),
        addition,
        quantization,
        tokenizer,
        None if kind_at(model) else str(model),
    )


def _open_gguf(path: Path, to: torch.dtype, compute: torch.dtype | None, *, allow_nan: bool) -> Source:
    file = GgufFile(read_header(path), to, finite=not allow_nan)
    module = build_skeleton(file.folder, dtype=to, store=file)
    store = file.of(module)
    weights = weights_of_checkpoint(module, store, untied=untie(module, store))
    return Source(
        path.stem,
        module,
        weights,
        file.folder,
        compute=compute,
        allow_nan=allow_nan,
        quantization=store.quantization,
    )


def _check_dtype(model: str, word: str | None, stored: set[torch.dtype]) -> None:
    """Raise SpecError where weights that are not quantized were asked for in another dtype than theirs."""
    if word is not None and any(d != getattr(torch, word) for d in stored):
        kinds = ", ".join(sorted(str(d).removeprefix("torch.") for d in stored))
        raise SpecError(
            f"dtype '{word}' for {model}",
            found=f"weights that are not quantized, in {kinds}",
            do="Leave it out: they keep their dtype. To compute in another there is --compute-dtype (compute_dtype)",
        )


def _check_module(module: nn.Module) -> None:
    """Raise CheckpointError where a parameter or buffer is not finite; buffers may forbid by minus infinity."""
    where = type(module).__name__
    for mask, tensors in ((None, module.named_parameters()), (True, module.named_buffers())):
        for name, tensor in tensors:
            if not tensor.is_meta and not isinstance(tensor, FakeTensor):
                check_finite(name, tensor, where, mask)


def _is_transformers(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module, "save_pretrained")


def require_real(module: nn.Module) -> None:
    """Raise TraceError where a module given in Python still lies on the meta device."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise TraceError(
                f"pruning {type(module).__name__}",
                found=f"parameter {name} is on the meta device and holds no numbers",
                do="Load the weights, or give the model's folder instead of the module",
            )
