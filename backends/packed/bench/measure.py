"""``sparsify bench``: a packed folder against the dense model, in one process and in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.backends.packed.bench.benchmark import Benchmark
from sparsify.backends.packed.bench.layers import site_speeds
from sparsify.backends.packed.bench.speed import decode_speed, prefill_speed
from sparsify.backends.packed.config import sites_of
from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.loaded.loading import Loading, first_inputs, load_model, load_on, measure_loading
from sparsify.backends.packed.loaded.on_gpu import prepared_products
from sparsify.context import Progress, report
from sparsify.errors import CheckpointError, SpecError
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.reading import kind_at, read_json
from sparsify.frontend.text_config import text_config
from sparsify.host import processor


def bench(
    folder: Path,
    against: str | None = None,
    *,
    prompt: int = 128,
    tokens: int = 64,
    rounds: int = 5,
    loading: bool = True,
    device: str = "cpu",
    tune: bool = True,
    trust_remote_code: bool = False,
    check: bool = True,
) -> Benchmark:
    """Measure a packed folder.

    Args:
        against: the dense folder or hub id; None unpacks the folder's own weights.
        prompt, tokens: tokens of the prompt, and tokens to generate greedily after it.
        loading: also load both in processes of their own, for seconds and memory (on a CPU).
        device: ``cpu``, ``cuda`` or ``cuda:N``. On a GPU the cache is static and every forward pass compiled, as
            transformers does it by itself. tune: measure the GPU's kernels, if the folder says so too.
        check: hold every byte of both folders, where they are ours, against their ``sparsify.json``.

    Raises:
        CheckpointError: no packed folder, or one that does not load. SpecError: a prompt longer than the context, or a
            device that is not there.
    """
    sites, place = _sites(folder), _device(device)
    loads = _loads(folder, against, trust_remote_code, check) if loading and place.type == "cpu" else None
    report(Progress("loading", what="both models"))
    dense = load_model(against or folder, trust_remote_code=trust_remote_code, check=check)
    if against is None:
        dense = dense.dequantize()
    dense = dense.to(place)
    packed = load_on(folder, place, tune=tune, trust_remote_code=trust_remote_code, check=check and against is not None)
    inputs = {name: tensor.to(place) for name, tensor in _inputs(packed, prompt, tokens).items()}
    with torch.inference_mode():
        prefill, length = prefill_speed(dense, packed, inputs, rounds)
        decode, same = None, None
        if packed.can_generate() and "input_ids" in inputs:
            decode, same = decode_speed(dense, packed, inputs["input_ids"], tokens, rounds)
        report(Progress("timing", what="every layer"))
        layers = site_speeds(packed, sites) if place.type == "cpu" else []
        products = prepared_products(packed) if place.type == "cuda" else []
    return Benchmark(
        folder=str(folder),
        against=against or "the same weights unpacked",
        processor=processor() if place.type == "cpu" else torch.cuda.get_device_name(place),
        threads=torch.get_num_threads(),
        dtype=str(packed.dtype).removeprefix("torch."),
        prompt=length,
        tokens=tokens,
        rounds=rounds,
        prefill=prefill,
        decode=decode,
        same_tokens=same,
        file_bytes=(_file_bytes(dense, against), Checkpoint(folder).nbytes()),
        loading=loads,
        sites=layers,
        device=str(place),
        memory=(dense.get_memory_footprint(), packed.get_memory_footprint()),
        products=products,
    )


def _loads(folder: Path, against: str | None, trust: bool, check: bool) -> tuple[Loading, Loading] | None:
    """What loading takes, dense and packed, in a process each; None where there is no dense folder."""
    if against is None:
        return None
    report(Progress("loading", 0, 2, "the dense model, in a process of its own"))
    dense = measure_loading(against, trust_remote_code=trust, check=check)
    report(Progress("loading", 1, 2, "the packed model, in a process of its own"))
    return dense, measure_loading(folder, trust_remote_code=trust, check=check)


def _file_bytes(dense: nn.Module, against: str | None) -> int:
    """Bytes of the dense model's weight files; of its weights where they are not at hand."""
    if against is not None and kind_at(against) == "folder":
        return Checkpoint(Path(against)).nbytes()
    return sum(p.numel() * p.element_size() for p in dense.parameters())


def _sites(folder: Path) -> dict[str, PackedSite]:
    path = folder / "config.json"
    if kind_at(folder) != "folder":
        found = "no such folder" if kind_at(folder) is None else "a file"
        raise CheckpointError(f"bench {folder}", found=found, do="Name a folder of --to packed")
    if kind_at(path) != "file":
        raise CheckpointError(f"bench {folder}", found="no config.json there", do="Name a folder of --to packed")
    sites = sites_of(read_json(path), str(folder))
    if sites is None:
        raise CheckpointError(
            f"bench {folder}", found="not a packed folder", do="Make one: sparsify compile MODEL --pass … --to packed"
        )
    return sites


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise SpecError(f"--device {name}", found="no such device", do="Take cpu, cuda or cuda:0")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or (device.index or 0) >= count:
        raise SpecError(
            f"--device {name}",
            found=f"no CUDA device {device.index or 0} for this torch ({torch.__version__})",
            do="Run on a machine with an NVIDIA GPU and a CUDA build of torch",
        )
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _inputs(model: Any, prompt: int, tokens: int) -> dict[str, torch.Tensor]:
    config = text_config(model.config)
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if getattr(config, "vocab_size", None) and isinstance(context, int) and context > 0 and prompt + tokens > context:
        raise SpecError(
            f"a prompt of {prompt} and {tokens} tokens more",
            found=f"a context of {context}",
            do=f"Give --prompt {context // 2} --tokens {context // 2}, say",
        )
    return first_inputs(model, prompt)
