"""A folder of any kind, opened by what its users open it with."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsify.backends.bench.contender import Contender, InOnnx, InTorch
from sparsify.backends.bench.kinds import folder_kind
from sparsify.backends.packed.loaded.loading import load_model, load_on
from sparsify.errors import SpecError
from sparsify.frontend.materialize import load

_CPU = torch.device("cpu")


def open_contender(
    folder: str | Path,
    device: torch.device = _CPU,
    *,
    tune: bool = True,
    trust_remote_code: bool = False,
    check: bool = True,
) -> Contender:
    """The model of a folder or of an ONNX file, on ``device``.

    Args:
        tune: of a packed folder on a GPU: measure its kernels, if the folder says so too.

    Raises:
        CheckpointError: it does not load. SpecError: an ONNX graph on a GPU. BackendError: kernels do not compile.
    """
    kind = folder_kind(folder)
    if kind == "ONNX":
        if device.type != "cpu":
            do = "Leave --device out, or run it with onnxruntime's own tools"
            raise SpecError(f"--device {device} for {folder}", found="an ONNX graph, which is timed on CPUs", do=do)
        return InOnnx(Path(folder), check=check)
    if kind == "ragged":
        return InTorch(load(folder, trust_remote_code=trust_remote_code, check=check).to(device))
    if kind == "packed":
        return InTorch(load_on(folder, device, tune=tune, trust_remote_code=trust_remote_code, check=check))
    return InTorch(load_model(folder, trust_remote_code=trust_remote_code, check=check).to(device))


def open_unpacked(
    folder: Path, device: torch.device, *, trust_remote_code: bool = False, check: bool = True
) -> InTorch:
    """The model of a packed folder with its weights made dense."""
    model = load_model(folder, trust_remote_code=trust_remote_code, check=check)
    return InTorch(model.dequantize().to(device))
