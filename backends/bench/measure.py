"""``sparsify bench``: a folder against another model, in one process and in turns."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsify.backends.bench.benchmark import Benchmark, PeerSpeed
from sparsify.backends.bench.contender import Contender, InTorch
from sparsify.backends.bench.kinds import folder_kind
from sparsify.backends.bench.layers import site_speeds
from sparsify.backends.bench.loading import Loading, measure_loading
from sparsify.backends.bench.opening import open_contender, open_unpacked
from sparsify.backends.bench.peers.peer import require_peers
from sparsify.backends.bench.peers.race import race_peers
from sparsify.backends.bench.turns import Pair, decode_speed, prefill_speed
from sparsify.backends.packed.config import sites_of
from sparsify.backends.packed.loaded.on_gpu import prepared_products
from sparsify.context import Progress, report
from sparsify.errors import Refused, SpecError
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.manifest import read_manifest
from sparsify.files.reading import kind_at, read_json, weight_bytes
from sparsify.frontend.stores import find_folder
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
    peers: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
) -> Benchmark:
    """Measure a folder of any kind: packed, an ordinary checkpoint, one of ragged widths, or an ONNX graph.

    Args:
        against: the other folder, of any kind, or a hub id; None, of a packed folder: its own weights unpacked.
        prompt, tokens: tokens of the prompt, and tokens to generate greedily after it.
        loading: also load both in processes of their own, for seconds and memory (on a CPU).
        device: ``cpu``, ``cuda`` or ``cuda:N``. On a GPU the cache is static and every forward pass compiled, as
            transformers does it by itself. tune: measure the GPU's kernels, if the folder says so too.
        peers: also against llama.cpp and onnxruntime-genai, where installed, on the model of ``against``.
        check: hold every byte of both folders, where they are ours, against their ``sparsify.json``.

    Raises:
        CheckpointError: no model there, or one that does not load. SpecError: nothing to measure it against, a prompt
            longer than the context, models that take other inputs, a device that is not there, or no peer.
        BackendError: a graph that does not run at this length, or a model that no peer can hold.
    """
    if against is not None and kind_at(against) is None:
        # A hub id; what is neither here nor there is told so.
        against = str(find_folder(against))
    kinds, place = _kinds(folder, against), _device(device)
    if peers:
        _check_peers(folder, against, kinds, place)
    loads = _loads(folder, against, trust_remote_code, check) if loading and place.type == "cpu" else None
    report(Progress("loading", what="both models"))
    if against is None:
        # Both read the same bytes: once checked is enough.
        one: Contender = open_unpacked(folder, place, trust_remote_code=trust_remote_code, check=check)
    else:
        one = open_contender(against, place, trust_remote_code=trust_remote_code, check=check)
    again = check and against is not None
    other = open_contender(folder, place, tune=tune, trust_remote_code=trust_remote_code, check=again)
    pair = one, other
    inputs = _inputs(pair, prompt, tokens)
    decode, same = None, None
    with torch.inference_mode():
        prefill = prefill_speed(pair, inputs, rounds) if one.prefills and other.prefills else None
        if one.generates and other.generates and "input_ids" in inputs:
            decode, same = decode_speed(pair, inputs["input_ids"], tokens, rounds)
        sites, products = [], []
        if kinds[1] == "packed" and isinstance(other, InTorch):
            report(Progress("timing", what="every layer"))
            packed = sites_of(read_json(folder / "config.json"), str(folder)) or {}
            sites = site_speeds(other.model, packed) if place.type == "cpu" else []
            products = prepared_products(other.model) if place.type == "cuda" else []
        raced: list[PeerSpeed] = []
        refused: list[Refused] = []
        if peers and against is not None and isinstance(one, InTorch):
            if decode is None:
                do = "Leave --peers out"
                raise SpecError(f"bench {folder} --peers", found="a model that generates nothing", do=do)
            raced, refused = race_peers(other, one.model, Path(against), inputs["input_ids"], tokens, rounds)
    memory = None
    if one.weight_bytes is not None and other.weight_bytes is not None:
        memory = one.weight_bytes, other.weight_bytes
    return Benchmark(
        folder=str(folder),
        against=against or "the same weights unpacked",
        kinds=kinds,
        processor=processor() if place.type == "cpu" else torch.cuda.get_device_name(place),
        threads=torch.get_num_threads(),
        dtypes=(one.dtype, other.dtype),
        prompt=inputs["input_ids"].shape[1] if "input_ids" in inputs else None,
        tokens=tokens,
        rounds=rounds,
        prefill=prefill,
        decode=decode,
        same_tokens=same,
        file_bytes=(
            one.weight_bytes or 0 if against is None else _file_bytes(Path(against), kinds[0]),
            _file_bytes(folder, kinds[1]),
        ),
        loading=loads,
        sites=sites,
        device=str(place),
        memory=memory,
        products=products,
        peers=raced,
        no_peers=refused,
    )


def _kinds(folder: Path, against: str | None) -> tuple[str, str]:
    """Of the model that it is measured against, and its own."""
    kind = folder_kind(folder)
    if against is not None:
        return folder_kind(against), kind
    if kind != "packed":
        made = read_manifest(folder if kind_at(folder) == "folder" else folder.parent).get("model")
        raise SpecError(
            f"bench {folder}",
            found=f"{'an' if kind == 'ONNX' else 'a'} {kind}{' folder' if kind == 'ragged' else ''}, and no model "
            "to measure it against",
            do=f"Give --against MODEL{f': it was made of {made}' if made else ', the dense one, say'}",
        )
    return "unpacked", kind


def _check_peers(folder: Path, against: str | None, kinds: tuple[str, str], place: torch.device) -> None:
    """What can be refused before anything is loaded."""
    asked = f"bench {folder} --peers"
    if place.type != "cpu":
        raise SpecError(asked, found=f"--device {place}; peers are timed on CPUs", do="Leave --device or --peers out")
    if against is None or kinds[0] != "checkpoint":
        found = "no model to make theirs of" if against is None else f"--against a model that is {kinds[0]}"
        raise SpecError(asked, found=found, do="Give the dense model's folder: --against MODEL")
    require_peers()


def _loads(folder: Path, against: str | None, trust: bool, check: bool) -> tuple[Loading, Loading] | None:
    """What loading takes, in a process each; None where there is one folder alone."""
    if against is None:
        return None
    found = []
    for number, name in enumerate((against, str(folder))):
        report(Progress("loading", number, 2, f"{name}, in a process of its own"))
        found.append(measure_loading(name, trust_remote_code=trust, check=check))
    return found[0], found[1]


def _file_bytes(place: Path, kind: str) -> int:
    """Bytes of a model's weight files; of an ONNX one the graph's as well, which may hold some."""
    if kind != "ONNX":
        return Checkpoint(place).nbytes()
    return weight_bytes(place if kind_at(place) == "folder" else place.parent)


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


def _inputs(pair: Pair, prompt: int, tokens: int) -> dict[str, torch.Tensor]:
    """What both are given."""
    configs = [text_config(model.config) for model in pair]
    for config in configs:
        context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if (
            getattr(config, "vocab_size", None)
            and isinstance(context, int)
            and context > 0
            and prompt + tokens > context
        ):
            raise SpecError(
                f"a prompt of {prompt} and {tokens} tokens more",
                found=f"a context of {context}",
                do=f"Give --prompt {context // 2} --tokens {context // 2}, say",
            )
    one, other = (model.inputs(prompt) for model in pair)
    if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in other.items()}:
        said = [", ".join(f"{n} {list(v.shape)}" for n, v in given.items()) for given in (one, other)]
        raise SpecError("bench of two models", found=f"that take other inputs: {said[0]}; {said[1]}",
                        do="Measure a model against the one that it was made of")  # fmt: skip
    # Tokens of the smaller vocabulary are tokens of both.
    sizes = [getattr(config, "vocab_size", None) or 0 for config in configs]
    return one if sizes[0] <= sizes[1] else other
