"""``sparsify unpack``: from a packed folder to an ordinary checkpoint, bit for bit, a tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sparsify.backends.packed.modules import FastLinear, packed_of
from torch import Tensor, nn

from sparsify.checkpoint import INDEX, Checkpoint
from sparsify.errors import CheckpointError
from sparsify.manifest import MANIFEST, read_manifest
from sparsify.packed.layout import Packed
from sparsify.packed.site import PackedSite, drop_from_config
from sparsify.packed.store import PackedStore, open_packed
from sparsify.safetensors_file import Layout, lay_out, lay_out_files, layout_from_json
from sparsify.source import build_skeleton
from sparsify.staging import Staging
from sparsify.weights import weights_of_checkpoint


def unpack_folder(folder: Path, out: Path, *, overwrite: bool = False, trust_remote_code: bool = False) -> Path:
    """Write the packed ``folder`` as the dense checkpoint that it was packed from: its names, shards and dtypes.

    A folder that was saved again by transformers does not say what those were: the model's own names are used.

    Raises:
        CheckpointError: not a packed folder, or a damaged one. BackendError: the output cannot be written.
    """
    store = open_packed(folder)
    if store is None:
        raise CheckpointError(
            f"unpacking {folder}", found="no packed folder (config.json has no quantization_config of sparsify)",
            do="An ordinary checkpoint is dense already; of packed ONNX folders sparsify expand makes dense ones",
        )  # fmt: skip
    manifest = read_manifest(folder)
    files = _dense_files(manifest)
    names = list(store.names())
    need = sum(store.shape(n).numel() * store.dtype(n).itemsize for n in names)
    with Staging(out, overwrite=overwrite, source=folder, need=need) as staging:
        for path in folder.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, MANIFEST):
                shutil.copyfile(path, staging.folder / path.name)
        drop_from_config(staging.folder / "config.json")
        if files is not None:
            dense = lay_out_files(staging.folder, files)
            _write_converted(store, dense, staging.folder, trust_remote_code)
        else:
            dense = lay_out(staging.folder, {n: (store.dtype(n), list(store.shape(n))) for n in names})
            for name in names:
                dense.write(name, store.read(name))
        if manifest:
            manifest.pop("packed", None)
            manifest["checksums"] = dense.written
            text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
            (staging.folder / MANIFEST).write_text(text, encoding="utf-8")
        return staging.commit()


def _write_converted(store: PackedStore, dense: Checkpoint, folder: Path, trust_remote_code: bool) -> None:
    """Every parameter of ``store`` into the tensors of the original checkpoint, converted back where it has to be."""
    weights = weights_of_checkpoint(build_skeleton(folder, trust_remote_code), dense)
    if missing := sorted({*weights.parameters()} - {*store.names()}):
        raise CheckpointError(
            f"unpacking {store.checkpoint.folder}", found=f"it does not hold {missing[0]}", do="Fetch the folder again"
        )
    for name in weights.parameters():
        weights.write(name, store.read(name))
    for name in dense.names():
        if name not in dense.written:
            dense.write(name, store.read(name))


def dense_modules(
    model: nn.Module, sites: Mapping[str, PackedSite], unpack: Callable[[Packed, Tensor | None], Tensor]
) -> nn.Module:
    """``model`` with its packed modules made dense again, in place."""
    from transformers.pytorch_utils import Conv1D

    for name, site in sites.items():
        path, _, leaf = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        starts = getattr(owner, f"{leaf}_starts", None)
        weight = nn.Parameter(site.parameter(unpack(packed_of(model, name, site), starts)), requires_grad=False)
        if leaf != "weight":
            for tensor in (leaf, f"{leaf}_meta", f"{leaf}_mask", f"{leaf}_starts"):
                if hasattr(owner, tensor):
                    delattr(owner, tensor)
            owner.register_parameter(leaf, weight)
            owner.sites.pop(leaf)
            continue
        with torch.device("meta"):
            dense: Any = Conv1D(site.rows, site.columns) if site.transposed else nn.Linear(site.columns, site.rows)
        dense.weight, dense.bias = weight, owner.bias
        parent, _, child = path.rpartition(".")
        model.get_submodule(parent)._modules[child] = dense.train(owner.training)
        if (hook := getattr(owner, "_hf_hook", None)) is not None:
            # accelerate brings a layer's inputs to its device by this.
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(dense, hook)
    for module in model.modules():
        if type(module) is FastLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model


def _dense_files(manifest: Mapping[str, Any]) -> dict[str, Layout] | None:
    content = manifest.get("packed", {}).get("dense_files")
    if content is None:
        return None
    try:
        return layout_from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{MANIFEST} of a packed folder", found=f"dense_files that cannot be read ({error!r})",
            do="Remove sparsify.json to unpack under the model's own names, or pack again",
        ) from error  # fmt: skip
