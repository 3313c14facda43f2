"""``sparsify bench``: a packed folder against the dense model, in one process and in turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.backends.packed.bench.benchmark import Benchmark, SiteSpeed, Speed
from sparsify.backends.packed.bench.report import kind_of
from sparsify.backends.packed.format import PackedSite, sites_of
from sparsify.backends.packed.loaded.loading import first_inputs, load_model, load_on, measure_loading
from sparsify.backends.packed.loaded.modules import FastLinear, packed_of
from sparsify.backends.packed.loaded.prepare import prepared_products
from sparsify.errors import CheckpointError, SpecError
from sparsify.files.checkpoint import Checkpoint
from sparsify.host import processor
from sparsify.runtime.ops import unpacked
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.stopwatch import Stopwatch


def bench(
    folder: Path, against: str | None = None, *, prompt: int = 128, tokens: int = 64, rounds: int = 5,
    loading: bool = True, device: str = "cpu", tune: bool = True, trust_remote_code: bool = False, observe:
        Callable[[str], None] = lambda stage: None,
) -> Benchmark:  # fmt: skip
    """Measure a packed folder.

    Args:
        against: the dense folder or hub id; None unpacks the folder's own weights.
        prompt, tokens: tokens of the prompt, and tokens to generate greedily after it.
        loading: also load both in processes of their own, for seconds and memory (on a CPU).
        device: ``cpu``, ``cuda`` or ``cuda:N``. On a GPU the cache is static and every forward pass compiled, as
            transformers does it by itself. tune: measure the GPU's kernels, if the folder says so too.

    Raises:
        CheckpointError: no packed folder, or one that does not load. SpecError: a prompt longer than the context, or a
            device that is not there.
    """
    sites, place = _sites(folder), _device(device)
    dense_folder = against or str(folder)
    loads = None
    if loading and against is not None and place.type == "cpu":
        observe("loading the dense model in a process of its own")
        dense_load = measure_loading(against, trust_remote_code=trust_remote_code)
        observe("loading the packed model in a process of its own")
        loads = (dense_load, measure_loading(folder, trust_remote_code=trust_remote_code))
    observe("loading both")
    dense = load_model(dense_folder, trust_remote_code=trust_remote_code)
    if against is None:
        dense = dense.dequantize()
    dense = dense.to(place)
    packed = load_on(folder, place, tune=tune, trust_remote_code=trust_remote_code)
    inputs = {name: tensor.to(place) for name, tensor in _inputs(packed, prompt, tokens).items()}
    with torch.inference_mode():
        observe("prefill")
        prefill, outputs = prefill_speed(dense, packed, inputs, rounds)
        decode, same = None, None
        if packed.can_generate() and "input_ids" in inputs:
            observe("decode")
            decode, same = decode_speed(dense, packed, inputs["input_ids"], tokens, rounds)
        observe("every layer")
        table = _site_speeds(packed, sites) if place.type == "cpu" else []
        products = prepared_products(packed) if place.type == "cuda" else []
    size = Checkpoint(folder).nbytes()
    dense_size = sum(p.numel() * p.element_size() for p in dense.parameters())
    if against is not None and Path(against).is_dir():
        dense_size = Checkpoint(Path(against)).nbytes()
    return Benchmark(
        str(folder), against or "the same weights unpacked",
        processor() if place.type == "cpu" else torch.cuda.get_device_name(place), torch.get_num_threads(),
        str(packed.dtype).removeprefix("torch."), outputs, tokens, rounds, prefill, decode, same, (dense_size, size),
        loads, table, str(place), (dense.get_memory_footprint(), packed.get_memory_footprint()), products,
    )  # fmt: skip


def _sites(folder: Path) -> dict[str, PackedSite]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"bench {folder}", found="no config.json there", do="Name a folder of --to packed")
    sites = sites_of(json.loads(path.read_text(encoding="utf-8")), str(folder))
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
            f"--device {name}", found=f"no CUDA device {device.index or 0} for this torch ({torch.__version__})",
            do="Run on a machine with an NVIDIA GPU and a CUDA build of torch",
        )  # fmt: skip
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _inputs(model: Any, prompt: int, tokens: int) -> dict[str, torch.Tensor]:
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if getattr(config, "vocab_size", None) and isinstance(context, int) and context > 0 and prompt + tokens > context:
        raise SpecError(
            f"a prompt of {prompt} and {tokens} tokens more", found=f"a context of {context}",
            do=f"Give --prompt {context // 2} --tokens {context // 2}, say",
        )  # fmt: skip
    return first_inputs(model, prompt)


def prefill_speed(dense: Any, packed: Any, inputs: dict[str, torch.Tensor], rounds: int) -> tuple[Speed, int]:
    length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
    times = _in_turns(lambda m: m(**inputs), dense, packed, rounds)
    return Speed.of(length, times), length


def decode_speed(dense: Any, packed: Any, ids: torch.Tensor, tokens: int, rounds: int) -> tuple[Speed, bool]:
    """Greedy generation: the time of tokens + 1 less that of one, which is the prompt's."""
    mask = torch.ones_like(ids)
    # transformers compiles a static cache's steps and replays them as CUDA graphs, so that no launch is waited for.
    cache = {"cache_implementation": "static"} if ids.is_cuda else {}

    def generate(model: Any, count: int) -> torch.Tensor:
        out: torch.Tensor = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
            **cache,
        )
        return out

    same = bool(torch.equal(generate(dense, tokens), generate(packed, tokens)))
    whole = _in_turns(lambda m: generate(m, tokens + 1), dense, packed, rounds)
    first = _in_turns(lambda m: generate(m, 1), dense, packed, rounds)
    return Speed.of(tokens, [(a[0] - b[0], a[1] - b[1]) for a, b in zip(whole, first, strict=True)]), same


def _in_turns(call: Callable[[Any], object], dense: Any, packed: Any, rounds: int) -> list[tuple[float, float]]:
    """Seconds of (dense, packed) in each round, after one that does not count."""
    times = []
    for number in range(rounds + 1):
        pair = []
        for model in (dense, packed):
            _wait(model)
            start = time.perf_counter()
            call(model)
            _wait(model)
            pair.append(time.perf_counter() - start)
        if number:
            times.append((pair[0], pair[1]))
    return times


def _wait(model: Any) -> None:
    """Until a GPU has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _site_speeds(model: nn.Module, sites: dict[str, PackedSite]) -> list[SiteSpeed]:
    """Every kind of linear layer once, the packed ones and the dense ones."""
    watch = Stopwatch()
    found: dict[tuple[Any, ...], list[Any]] = {}
    for name, site in sites.items():
        shape = (site.rows, site.columns) if site.experts is None else (site.experts, site.rows, site.columns)
        key = (kind_of(name), shape, site.layout)
        found.setdefault(key, [0, name, site])[0] += 1
    rows = []
    for (kind, shape, layout), (count, name, site) in found.items():
        packed = PackedWeight.holding(packed_of(model, name, site))
        timing = None
        if site.experts is None:
            timing = watch.packed(unpacked(packed.packed, packed.starts), packed)
        rows.append(SiteSpeed(kind, count, shape, layout, "packed", timing))
    dense: dict[tuple[Any, ...], list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kernel = "ours" if isinstance(module, FastLinear) else "torch"
            place = (kind_of(f"{name}.weight"), tuple(module.weight.shape), kernel)
            dense.setdefault(place, [0, module.weight])[0] += 1
    for (kind, shape, kernel), (count, weight) in dense.items():
        rows.append(SiteSpeed(kind, count, shape, "dense", kernel, watch.dense(weight.detach())))
    return rows
