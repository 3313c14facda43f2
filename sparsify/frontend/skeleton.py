"""The model that a config.json describes, without memory for its parameters."""

from __future__ import annotations

import copy
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify.errors import CheckpointError, first_line
from sparsify.files.reading import read_json
from sparsify.frontend.building.bounds import check_config, few_parts
from sparsify.frontend.building.computed import compute as compute_left_out
from sparsify.frontend.building.computed import left_out
from sparsify.frontend.building.heads import built, is_of, name_class
from sparsify.frontend.building.widths import resize, sizes_of
from sparsify.host import alone
from sparsify.ir.store import DenseView, TensorStore

# What a store may give weights in, by the names that a config has for them.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@alone()
def build_skeleton(
    folder: Path,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    edit: Callable[[nn.Module], None] = lambda model: None,
    store: TensorStore | None = None,
    compute: torch.dtype | None = None,
    like: nn.Module | None = None,
) -> nn.Module:
    """The model that ``folder``'s config.json describes, in eval mode, with parameters that take no memory.

    The parameters are fake tensors that claim to be on the CPU: traced on the plain meta device, literal tensors in
    a model's code (Falcon's index lists) would lose their numbers. Buffers that no checkpoint holds
    (rotary frequencies) are real and computed. ``dtype`` is used where the config names none; ``edit`` changes the
    model while it is on the meta device.

    Args:
        store: what reads the folder's weights: where it gives them dense, so is the model, and the model may not be
            out of all proportion to them.
        compute: the model is built in this dtype whatever config.json says.
        like: the same model, built before: its class is not looked for again.

    Raises:
        CheckpointError: no config, one that builds no model, or weights that only a quantizer reads.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        raise CheckpointError(f"config.json of {folder}", found="no such file", do="Is this a model folder?")
    content = read_json(folder / "config.json")
    tensors = None if store is None else sum(1 for _ in store.names())
    check_config(content, tensors, folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # a config's own checks raise whatever they like
        marked = (folder / "config.json").read_bytes().startswith(BOM_UTF8)
        why = "it begins with a byte-order mark: save it as UTF-8 without one" if marked else first_line(error)
        raise CheckpointError(
            f"config.json of {folder}",
            found=f"transformers cannot read it ({why})",
            do="Check the file; a model with code of its own needs --trust-remote-code",
        ) from error
    if isinstance(store, DenseView):
        _as_dense(config, content, store.dense_config(content))
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"model {folder}",
            found="a quantized checkpoint (quantization_config in config.json)",
            do="Prune the unquantized model, then quantize the result",
        )
    sizes = sizes_of(folder)
    try:
        with few_parts(tensors, folder):
            if like is not None:
                config.architectures = getattr(like.config, "architectures", None)
            elif store is not None:
                name_class(config, store.names())
        with torch.device("meta"), few_parts(tensors, folder):
            named = compute or getattr(config, "dtype", None) or dtype or torch.float32
            model = construct(config, trust_remote_code, named, None if store is None else store.names())
        _to_meta(model)
        # Before widths that no config says: those are of folders of ours, of which nothing is left out.
        missing = [] if store is None or sizes is not None else left_out(model, store)
        compute_left_out(model, missing, folder)
        with torch.device("meta"):
            if sizes is not None:
                resize(model, sizes)
            edit(model)
    except CheckpointError:
        raise
    except Exception as error:  # so do the constructors of models, and what initialises them
        raise CheckpointError(
            f"model of {folder}",
            found=f"its config.json builds no model ({first_line(error)})",
            do="Compare config.json with the one that the model was published with",
        ) from error
    _fake_parameters(model)
    return model.eval()


def _as_dense(config: Any, content: dict[str, Any], dense: dict[str, Any]) -> None:
    """Let ``config``, which was made of ``content``, say what ``dense`` says of quantization and of the dtype."""
    parts = [config, *(getattr(config, key, None) for key, value in content.items() if isinstance(value, dict))]
    if "quantization_config" not in dense:
        for part in parts:
            if getattr(part, "quantization_config", None) is not None:
                del part.quantization_config
    word = dense.get("dtype", dense.get("torch_dtype"))
    if word != content.get("dtype", content.get("torch_dtype")) and word in DTYPES:
        config.dtype = DTYPES[word]


def recast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module``, which stays as it is, with parameters that take no memory and are in ``dtype``.

    Buffers that a checkpoint holds follow; of the others those of less than float32, for what a model keeps in float32
    (rotary frequencies) it does for a reason.
    """
    unsaved = {id(m._buffers[n]) for m in module.modules() for n in m._non_persistent_buffers_set if n in m._buffers}
    memo: dict[int, torch.Tensor] = {}
    mode = FakeTensorMode()
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_floating_point():
            memo[id(tensor)] = tensor
        elif id(tensor) in unsaved:
            memo[id(tensor)] = tensor.to(dtype) if tensor.element_size() < 4 else tensor
        else:
            with mode:
                fake = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(module, memo)


def construct(
    config: Any, trust_remote_code: bool, dtype: torch.dtype, tensors: Iterable[str] | None = None
) -> nn.Module:
    """The model that a config names, by transformers' own class for it, with attention that can be traced.

    Args:
        tensors: the names in the folder; an encoder is built without a pooler where there is none among them.
    """
    import transformers

    _plain_attention(config)
    names = list(getattr(config, "architectures", None) or [])
    kind = getattr(transformers, names[0], None) if names else None
    if kind is not None:
        wanted = getattr(kind, "config_class", None)
        # transformers gives some configs the class of another family by its tables.
        if wanted is not None and not isinstance(config, wanted) and not is_of(kind, config):
            # Whoever loads the output goes by model_type alone.
            raise CheckpointError(
                f"config.json of {config.name_or_path or 'the model'}",
                found=f"model_type {config.model_type} and architecture {names[0]}, which is of {wanted.model_type}",
                do="Compare config.json with the one that the model was published with",
            )
        return built(kind, config, dtype, tensors)
    causal = "CausalLM" in names[0] if names else "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _plain_attention(config: Any) -> None:
    """Let transformers choose how attention is computed, which is no matter of the weights: a config may name a library
    that is not installed here, or one whose operators no graph can hold."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})]
    for part in parts:
        if getattr(part, "_attn_implementation", None) not in (None, "eager", "sdpa"):
            part._attn_implementation_internal = None


def _to_meta(model: nn.Module) -> None:
    """Parameters that a model draws by ``torch.normal`` (DiffLlama's) are real wherever it is built."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                meta = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                # One for one: tied weights stay one object.
                module._parameters[name] = made.setdefault(id(parameter), meta)


def _fake_parameters(model: nn.Module) -> None:
    fakes: dict[int, torch.Tensor] = {}
    with FakeTensorMode():
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in tables:
                for name, tensor in tensors.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=False)
                    # One fake per tensor: tied weights stay one object.
                    tensors[name] = fakes.setdefault(id(tensor), fake)
