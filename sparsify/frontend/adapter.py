"""LoRA adapters of ``peft``, merged into the weights that they lie on: W + scaling · B A, a tensor when it is read.

The arithmetic and its order are those of peft's ``merge_and_unload`` (0.21, ``peft/tuners/lora/layer.py``), so that the
result is the same to the bit; the model is never in memory as a whole. Hu et al., https://arxiv.org/abs/2106.09685;
rsLoRA's scaling: Kalajdzievski, https://arxiv.org/abs/2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsify.errors import CheckpointError, SpecError
from sparsify.files.checkpoint import INDEX, PICKLED, PICKLED_INDEX
from sparsify.files.checkpoint import WEIGHTS as BASE_WEIGHTS
from sparsify.files.ledger import Ledger
from sparsify.files.reading import admit, kind_at, read_json
from sparsify.frontend.matching import place
from sparsify.ir.store import DenseView, TensorStore
from sparsify.ir.weights import tied_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HOW = "merge it first: in Python save what PeftModel.from_pretrained(base, adapter).merge_and_unload() returns"
# What a config says that makes the adapter another sum than W + scaling · B A, or its base another model.
_OTHER = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "trainable_token_indices",
    "layer_replication", "target_parameters", "arrow_config", "velora_config",
)  # fmt: skip
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_PART = re.compile(r"(.+?)\.(lora_[AB]\.weight|lora_embedding_[AB](?:\.weight)?)")


@dataclass(frozen=True)
class Addition:
    """What is added to a parameter: scaling · (second @ first), turned where the parameter is stored [in, out].

    ``first``: [rank, in features]; ``second``: [out features, rank]. ``rounded``: to the parameter's dtype before it is
    added, which peft does for embeddings.
    """

    first: Tensor
    second: Tensor
    scaling: float
    turned: bool
    rounded: bool = False

    def add_to(self, weight: Tensor) -> Tensor:
        """``weight`` with the sum in it, in place, in its own dtype."""
        delta = self.second @ self.first
        delta = (delta.T if self.turned else delta) * self.scaling
        weight += delta.to(weight.dtype) if self.rounded else delta
        return weight


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, whose kind is one that is understood.

    Attributes:
        base: what it says that its base model is. tensors: its tensors by the names of peft, in memory.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def base(self) -> str | None:
        found = self.config.get("base_model_name_or_path")
        return found if isinstance(found, str) and found else None

    def as_dict(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"rank": self.config.get("r"), "alpha": self.config.get("lora_alpha"), "tensors": len(self.tensors)}


def has_adapter(folder: Path) -> bool:
    """Whether an adapter of peft lies in ``folder``."""
    return kind_at(folder / CONFIG) is not None


def refusal(folder: Path, alone: bool) -> CheckpointError:
    """What is raised where an adapter is found and nobody said what is to become of it."""
    config = read_json(folder / CONFIG)
    kind = f"{config.get('peft_type') or 'peft'} of rank {config.get('r')}"
    where = (
        f"and no weights: it lies on those of {config.get('base_model_name_or_path')}" if alone else "on the weights"
    )
    return CheckpointError(
        f"model {folder}",
        found=f"an adapter ({CONFIG}: {kind}) {where}",
        do=f"Pass --adapter merge (adapter='merge') to compile, eval or compare, or {_HOW}"
        + ("" if alone else f"; to take the weights without it move {CONFIG} away"),
    )


def read_adapter(folder: Path, check: bool = True, allow_nan: bool = False) -> Adapter:
    """The adapter in ``folder``, read whole: it is small beside its model.

    Raises:
        CheckpointError: no sound adapter, or one that is another sum than LoRA's.
    """
    config = read_json(folder / CONFIG)
    asked = f"merging the adapter {folder}"
    other = [f"{key}: {config[key]!r}" for key in _OTHER if config.get(key)]
    if config.get("peft_type") != "LORA":
        other = [f"peft_type: {config.get('peft_type')!r}"]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        other.append(f"init_lora_weights: {config['init_lora_weights']!r}, which changes the base model")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.^]+", key) for key in patterns):
        other.append("an alpha_pattern of expressions")
    if other:
        raise CheckpointError(asked, found=f"{CONFIG} says {other[0]}", do=f"Only LoRA itself is merged here; {_HOW}")
    if kind_at(folder / WEIGHTS) is None:
        do = "Fetch the folder again; an adapter_model.bin is a pickle: load and save it with peft"
        raise CheckpointError(asked, found=f"no {WEIGHTS}", do=do)
    ledger = Ledger.of(folder, check, finite=not allow_nan)
    ledger.check_file(folder / CONFIG)
    try:
        tensors = load_file(admit(folder / WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            asked, found=f"{WEIGHTS} is no sound safetensors file ({error})", do="Fetch it"
        ) from error
    for name, tensor in tensors.items():
        ledger.check_tensor(name, tensor)
    return Adapter(folder, config, tensors)


def find_adapter(
    folder: Path, asked: str | None, find: Callable[[str], Path], check: bool, allow_nan: bool
) -> tuple[Path, Adapter | None]:
    """The folder of the weights, and the adapter that is to be merged into them.

    Args:
        asked: what a user said of adapters. find: gives the folder of a model by its name.

    Raises:
        CheckpointError: an adapter of which nobody said anything, or one that cannot be merged.
        SpecError: there is none to merge.
    """
    if not has_adapter(folder):
        if asked is not None:
            raise SpecError(f"--adapter {asked}", found=f"no adapter_config.json in {folder}", do="Leave it out")
        return folder, None
    alone = not any(kind_at(folder / name) for name in (BASE_WEIGHTS, INDEX, PICKLED, PICKLED_INDEX))
    if asked is None:
        raise refusal(folder, alone)
    found = read_adapter(folder, check, allow_nan)
    if not alone:
        return folder, found
    if found.base is None:
        raise CheckpointError(
            f"the base model of {folder}",
            found="adapter_config.json names none",
            do="Put the adapter's two files into the folder of its base model",
        )
    base = find(found.base)
    if not base.is_dir() or has_adapter(base):
        raise CheckpointError(
            f"the base model of {folder}",
            found=f"{base}, which is no folder of a model alone",
            do="Merge that first, or correct base_model_name_or_path in adapter_config.json",
        )
    return base, found


class MergedStore:
    """The tensors of a model with an adapter merged into them, each when it is read.

    Args:
        base: the weights without it. additions: by stored name. replaced: tensors that the adapter brings whole.
    """

    def __init__(
        self, base: TensorStore, additions: Mapping[str, list[Addition]], replaced: Mapping[str, Tensor]
    ) -> None:
        self.base, self.additions, self.replaced = base, dict(additions), dict(replaced)

    def names(self) -> Iterable[str]:
        return dict.fromkeys([*self.base.names(), *self.replaced])

    def shape(self, name: str) -> torch.Size:
        return self.replaced[name].shape if name in self.replaced else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.replaced[name].dtype if name in self.replaced else self.base.dtype(name)

    def read(self, name: str) -> Tensor:
        tensor = self.replaced[name].clone() if name in self.replaced else self.base.read(name)
        for addition in self.additions.get(name, ()):
            tensor = addition.add_to(tensor)
        return tensor

    def write(self, name: str, tensor: Tensor) -> None:
        raise CheckpointError(f"writing {name}", found="a source", do="Write to an output")

    def dense_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """See :class:`DenseView`."""
        return self.base.dense_config(config) if isinstance(self.base, DenseView) else config


def merged(adapter: Adapter, model: nn.Module, store: TensorStore) -> MergedStore:
    """``store``, which holds the parameters of ``model``, with the adapter in it.

    Raises:
        CheckpointError: a part of it that belongs to no parameter, or to one that is not stored as one matrix.
    """
    aliases, parameters = tied_names(model), dict(model.named_parameters(remove_duplicate=False))
    held = {name: keys[0] for name, keys in place(model, store.names()).renamed.items()}
    held |= {aliases.get(name, name): key for name, key in held.items() if aliases.get(name, name) not in held}
    parts: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        name = key.removeprefix("base_model.model.")
        found = _PART.fullmatch(name)
        if found is not None:
            parts.setdefault(found[1], {})[found[2].removesuffix(".weight")] = tensor
        elif "lora_" not in name and (own := name.replace(".base_layer.", ".")) in parameters:
            stored = held.get(own, own)
            like = store.dtype(stored) if own in held else next(iter(parameters.values())).dtype
            replaced[stored] = tensor.to(like)
        else:
            raise _no_place(adapter, key, "no parameter of the model is of that name")
    additions: dict[str, list[Addition]] = {}
    for module, both in parts.items():
        name = f"{module}.weight"
        stored = held.get(aliases.get(name, name), "")
        kind = type(model.get_submodule(module)).__name__ if name in parameters else ""
        if kind not in ("Linear", "Conv1D", "Embedding") or not stored or len(both) != 2:
            raise _no_place(adapter, module, "no matrix of the folder is that module's")
        first, second = (both[part].float() for part in sorted(both))
        turned = kind != "Linear"
        shape = (first.shape[1], second.shape[0]) if turned else (second.shape[0], first.shape[1])
        if tuple(store.shape(stored)) != shape or first.shape[0] != second.shape[1]:
            raise _no_place(adapter, module, f"it is for {list(shape)}, and {stored} is {list(store.shape(stored))}")
        scaling = _scaling(adapter.config, module, first.shape[0])
        additions.setdefault(stored, []).append(Addition(first, second, scaling, turned, kind == "Embedding"))
    return MergedStore(store, additions, replaced)


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for key, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _no_place(adapter: Adapter, part: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"merging the adapter {adapter.folder}",
        found=f"{part} in it: {why}",
        do=f"Is it of this base model? Else {_HOW}",
    )
