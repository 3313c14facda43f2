"""``sparsify unpack``: from a packed folder to an ordinary checkpoint, bit for bit, a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.backends.packed.store import PackedStore, open_packed
from sparsify.context import counted
from sparsify.errors import CheckpointError
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.companions import check_companions, copy_companions, rewrite_config
from sparsify.files.ledger import Ledger, write_manifest
from sparsify.files.manifest import MANIFEST, section
from sparsify.files.staging import Staging
from sparsify.files.writer import FileLayout, lay_out, lay_out_files, layout_from_json, nbytes
from sparsify.frontend.matching import weights_of_checkpoint
from sparsify.frontend.skeleton import build_skeleton
from sparsify.frontend.ties import untie
from sparsify.provenance.card import write_card
from sparsify.provenance.history import restated


def unpack_folder(
    folder: Path,
    out: Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
    allow_nan: bool = False,
) -> Path:
    """Write the packed ``folder`` as the dense checkpoint that it was packed from: its names, shards and dtypes.

    A folder that was saved again by transformers does not say what those were: the model's own names are used.

    Args:
        check: hold every byte that is read against the folder's ``sparsify.json``.
        allow_nan: let NaN and infinity pass.

    Raises:
        CheckpointError: not a packed folder, or a damaged one. BackendError: the output cannot be written.
    """
    ledger = Ledger.of(folder, check, finite=not allow_nan)
    check_companions(folder, ledger)
    store = open_packed(folder, ledger)
    if store is None:
        raise CheckpointError(
            f"unpacking {folder}",
            found="no packed folder (config.json has no quantization_config of sparsify)",
            do="An ordinary checkpoint is dense already; of packed ONNX folders sparsify expand makes dense ones",
        )
    manifest = dict(ledger.manifest)
    names = list(store.names())
    plain: FileLayout = {n: (store.dtype(n), list(store.shape(n))) for n in names}
    files = _dense_files(manifest)
    need = sum(nbytes(layout) for layout in (files or {"": plain}).values())
    with Staging(out, overwrite=overwrite, source=folder, need=need) as staging:
        copy_companions(folder, staging.folder)
        rewrite_config(staging.folder, store.dense_config)
        if files is not None:
            dense = lay_out_files(staging.folder, files)
            _write_converted(store, dense, staging.folder, trust_remote_code)
        else:
            dense = lay_out(staging.folder, plain)
            for name in counted("unpacking", names):
                dense.write(name, store.read(name))
        if manifest:
            manifest.pop("packed", None)
            manifest |= {"allow_nan": True} if allow_nan else {}
            manifest |= {"source_check": ledger.checked, "history": restated(manifest, "unpack")}
            write_card(staging.folder, manifest)
            write_manifest(staging.folder, manifest, dense.written)
        return staging.commit()


def _write_converted(store: PackedStore, dense: Checkpoint, folder: Path, trust_remote_code: bool) -> None:
    """Every parameter of ``store`` into the tensors of the original checkpoint, converted back where it has to be."""
    model = build_skeleton(folder, trust_remote_code, store=dense)
    # What is tied is seen where the numbers are.
    weights = weights_of_checkpoint(model, dense, untied=untie(model, store))
    if missing := sorted({*weights.parameters()} - {*store.names()}):
        raise CheckpointError(
            f"unpacking {store.checkpoint.folder}", found=f"it does not hold {missing[0]}", do="Fetch the folder again"
        )
    for name in counted("unpacking", weights.parameters()):
        weights.write(name, store.read(name))
    for name in dense.names():
        if name not in dense.written:
            dense.write(name, store.read(name))


def _dense_files(manifest: Mapping[str, Any]) -> dict[str, FileLayout] | None:
    content = section(manifest, "packed").get("dense_files")
    if content is None:
        return None
    try:
        return layout_from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{MANIFEST} of a packed folder",
            found=f"dense_files that cannot be read ({error!r})",
            do="Remove sparsify.json to unpack under the model's own names, or pack again",
        ) from error
