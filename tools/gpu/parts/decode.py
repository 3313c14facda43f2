"""Greedy decoding of a random model of LLaMA-7B's shape, dense and 2:4: tokens a second, and weights in memory.

One sequence, transformers' static cache. The decoder layers are compiled by torch.compile, one compilation for all of
them, since a compilation of the whole model would take the minutes that a lent GPU is there for; and a whole step, its
token fed to the next, is replayed from a CUDA graph.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from functools import partial
from typing import Any

import torch
from machine import Found, Machine, Step
from results import Results
from torch import Tensor, nn

from parts.checks import broken_families
from parts.shapes import key_of, time_shape
from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.loaded import prepare
from sparsify.backends.packed.loaded.modules import pack_modules
from sparsify.runtime.cuda.autotune.times import TimesFile, random_24
from sparsify.runtime.layout import unpack

_PROMPT = 16
# Past rounding in 16 bits through every layer; a wrong product gives about 1.4.
_WRONG = 0.2


def steps(machine: Machine, results: Results) -> list[Step]:
    broken = broken_families(results)
    return [(f"{name} layers", partial(decode, machine, name, broken)) for name in ("eager", "compiled")]


def decode(machine: Machine, layers: str, broken: set[str]) -> Found:
    sizes = machine.sizes
    # The models of the step before are cycles.
    gc.collect()
    with torch.inference_mode():
        dense, packed = llama(machine, broken)
        ids = torch.randint(1, sizes.decoded["vocab_size"], (1, _PROMPT), device=machine.device)
        error = logits_error(dense, packed, ids)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        decoders = [Decoder(machine, model, ids, sizes.steps, layers == "compiled") for model in (dense, packed)]
        tokens = [decoder.run(sizes.steps) for decoder in decoders]
        # In turns: what else the card does meets both.
        times = [[d.seconds(machine, sizes.steps) for d in decoders] for _ in range(sizes.rounds)]
    ratios = [a / b for a, b in times]
    one, other = (sizes.steps / statistics.median(t[i] for t in times) for i in (0, 1))
    memory = [model.get_memory_footprint() for model in (dense, packed)]
    return {
        "dense_tokens_s": one,
        "packed_tokens_s": other,
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "logits_error": error,
        "same_tokens": float((tokens[0] == tokens[1]).float().mean()),
        "weights_bytes": memory,
        "plans": sorted({str(record.plan) for record in packed.sparsify_prepared if record.plan}),
        "compilations": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "left_dense": sum(record.plan is None for record in packed.sparsify_prepared),
    }


def logits_error(dense: Any, packed: Any, ids: Tensor) -> float:
    """‖a − b‖/‖a‖ of the logits of one prompt that both read: greedy tokens of a random model part by mere rounding."""
    a, b = (model(input_ids=ids, use_cache=False).logits.float() for model in (dense, packed))
    error = float((a - b).norm() / a.norm())
    if not error < _WRONG:
        raise AssertionError(f"the packed model's logits are {error:.3f} from the dense one's")
    return error


def know_times(machine: Machine, config: Any, broken: set[str]) -> None:
    """Race what part ``shapes`` did not get to: of itself a model is prepared by times at every number of tokens."""
    wide, inner = config.hidden_size, config.intermediate_size
    head = wide // config.num_attention_heads
    joined = (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    for rows, columns in ((joined, wide), (wide, wide), (2 * inner, wide), (wide, inner)):
        if TimesFile.of(machine.device).get(key_of(rows, columns)) is None:
            time_shape(machine, rows, columns, (1, 16), broken)


def llama(machine: Machine, broken: set[str]) -> tuple[Any, Any]:
    """A random model whose blocks are 2:4: dense, and prepared for this GPU."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(eos_token_id=None, pad_token_id=0, **machine.sizes.decoded)
    with torch.device(machine.device):
        dense = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    packed = copy.deepcopy(dense)
    sites, groups = {}, []
    for i in range(config.num_hidden_layers):
        attention = [f"model.layers.{i}.self_attn.{n}_proj.weight" for n in "qkvo"]
        mlp = [f"model.layers.{i}.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
        groups += [attention[:3], mlp[:2]]
        for name in (*attention, *mlp):
            rows, columns = dense.get_parameter(name).shape
            sites[name] = PackedSite("packed24", rows, columns, None, False, rows * columns // 2)
    pack_modules(packed, sites, groups)
    for name, site in sites.items():
        layer = packed.get_submodule(name.removesuffix(".weight"))
        content = random_24(site.rows, site.columns, torch.bfloat16, machine.device)
        layer.weight.data.copy_(content.values * 0.02)
        layer.weight_meta.copy_(content.codes)
        dense.get_parameter(name).data.copy_(unpack(layer.packed()))
    if not machine.emulated:
        know_times(machine, config, broken)
    packed.sparsify_prepared = prepare(packed, tune=not machine.emulated, target=machine.target)
    return dense, packed


class OwnCache(nn.Module):
    """A decoder layer with a cache of its own, so that one compilation serves all: a layer that looks its part up in
    the model's cache is compiled anew for every number."""

    def __init__(self, layer: Any, cache: Any) -> None:
        super().__init__()
        self.layer, self.cache = layer, cache
        layer.self_attn.layer_idx = 0

    def forward(self, hidden: Tensor, **given: Any) -> Any:
        # By the name that this version of transformers has for it.
        name = "cache" if "cache" in given else "past_key_values"
        return self.layer(hidden, **given | {name: self.cache})


class Decoder:
    """A model's steps of one token after another, from the end of a prompt to the end of the cache."""

    def __init__(self, machine: Machine, model: Any, ids: Tensor, most: int, compiled: bool) -> None:
        from transformers import StaticCache

        self.model, self.ids = model, ids
        length = ids.shape[1] + most + 8
        one = copy.deepcopy(model.config)
        one.num_hidden_layers = 1
        layers = model.model.layers
        self.caches = [StaticCache(config=one, max_cache_len=length) for _ in layers]
        for i, cache in enumerate(self.caches):
            layers[i] = OwnCache(layers[i], cache)
        self.place = torch.zeros(1, dtype=torch.long, device=ids.device)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=ids.device)
        self.said = torch.zeros(length, dtype=torch.long, device=ids.device)
        self.prefill()
        for cache in self.caches:
            for tensor in (cache.layers[0].keys, cache.layers[0].values, cache.layers[0].cumulative_length):
                # Not a reason to compile again either: no CUDA graph is taken of what is compiled here.
                torch._dynamo.mark_static_address(tensor, guard=False)
        if compiled:
            for layer in layers:
                machine.compile_layer(layer.layer)
        self.replay = machine.step_recorder(self.step)

    def prefill(self) -> None:
        for cache in self.caches:
            cache.reset()
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        # It is not what is timed, and would be compiled for its own length.
        with torch.compiler.set_stance("force_eager"):
            self._forward(self.ids, places)
        self.place.fill_(self.ids.shape[1])

    def step(self) -> None:
        self._forward(self.token, self.place)
        self.place += 1

    def _forward(self, ids: Tensor, places: Tensor) -> None:
        # The first layer's cache stands for all where the mask is made.
        cache, positions = self.caches[0], places.unsqueeze(0)
        out = self.model(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=1)
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.said.index_copy_(0, places[-1:] + 1, self.token.view(-1))

    def run(self, count: int) -> Tensor:
        """The tokens of ``count`` steps after the prompt, which is read anew."""
        self.prefill()
        for _ in range(count):
            self.replay()
        return self.said[self.ids.shape[1] :][:count].clone()

    def seconds(self, machine: Machine, count: int) -> float:
        """What the same takes without the prompt."""
        self.prefill()
        machine.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            self.replay()
        machine.synchronize()
        return time.perf_counter() - began
