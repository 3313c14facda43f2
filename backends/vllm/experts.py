"""Mixtures of experts in vLLM whose stacks stay packed on CPUs. GPUs have no kernel for those: there they are dense."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from sparsify.backends.vllm.orphan_stacks import OrphanStack
from sparsify.backends.vllm.products import Product, product_of
from sparsify.backends.vllm.stacks import Rank, Stack
from sparsify.errors import BackendError
from sparsify.runtime.layout import unpack
from sparsify.runtime.packed_weight import PackedWeight

logger = init_logger(__name__)
_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)
# What vLLM calls the two stacks, and the matrices that it takes from each for an expert.
_STACKS = {"w13": ("w1", "w3"), "w2": ("w2",)}


class SparsifyExpertsMethod(FusedMoEMethodBase):
    """Experts of which one stack or both are packed.

    Args:
        gates, downs: the stacks of the checkpoint. exact: of few bits, inputs are not rounded; policy, tune: of GPUs,
            which have no kernel for experts. copies: of which none is made of stacks.
    """

    def __init__(
        self,
        moe: Any,
        gates: Stack | OrphanStack,
        downs: Stack | OrphanStack,
        *,
        exact: bool = False,
        policy: str = "",
        tune: bool = True,
        copies: object = None,
    ) -> None:
        super().__init__(moe)
        if copies is not None:
            logger.info_once("sparsify: policy both: stacks of experts stay packed alone")
        self.awaited, self.exact = {"w13": gates, "w2": downs}, exact
        self._dense: UnquantizedFusedMoEMethod | None = None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        self._check(layer)
        moe, inner = self.moe, intermediate_size_per_partition
        total = moe.num_logical_experts
        local = layer._map_global_expert_id_to_local_expert_id
        own = sorted((e for e in range(total) if local(e) >= 0), key=local)
        rank = Rank(tuple(own), moe.tp_rank, moe.tp_size, inner, params_dtype)
        layer.sparsify_arrivals = {}
        for name, shards in _STACKS.items():
            shape = (hidden_size, inner * moe.tp_size) if name == "w2" else (2 * inner * moe.tp_size, hidden_size)
            arrivals = self.awaited[name].arrivals(layer, shards, (total, *shape), rank)
            layer.sparsify_arrivals[name] = arrivals
            for part, kind in self.awaited[name].tensors.items():
                parameter = nn.Parameter(torch.empty(0, dtype=kind or params_dtype), requires_grad=False)
                parameter.weight_loader = partial(arrivals.load, part)  # type: ignore[attr-defined]
                layer.register_parameter(f"{name}_{part}", parameter)

    def _check(self, layer: Any) -> None:
        moe, found = self.moe, None
        if layer.activation not in _ACTIVATIONS or not moe.is_act_and_mul:
            found = f"experts with the activation {layer.activation.value}"
        elif moe.has_bias or layer.swiglu_limit is not None:
            found = "experts with biases, or with gates that are clamped"
        elif layer.is_fused_checkpoint_transposed and any(stack.dense for stack in self.awaited.values()):
            found = "a dense stack beside a packed one, in a family that stores stacks transposed"
        if found is not None:
            raise BackendError(
                f"packed experts {self.awaited['w13'].name}",
                found=f"{found}, which this plug-in does not run",
                do="Serve the folder with `sparsify serve`, or keep the experts dense (--ignore) and pack it again",
            )
        # Packed stacks lie as vLLM's do, whatever the family's own checkpoints are like.
        layer.is_fused_checkpoint_transposed = False

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return None if self._dense is None else self._dense.get_fused_moe_quant_config(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        device = layer.w13_weight.device
        stacks = {name: arrivals.complete() for name, arrivals in layer.sparsify_arrivals.items()}
        for name in _STACKS:
            for part in self.awaited[name].tensors:
                delattr(layer, f"{name}_{part}")
        del layer.sparsify_arrivals
        experts = layer.local_num_experts
        if device.type == "cuda":
            logger.warning("sparsify: %s is kept dense: no GPU kernel multiplies stacks", self.awaited["w13"].name)
            for name, stack in stacks.items():
                dense = stack if isinstance(stack, Tensor) else unpack(stack).view(experts, -1, stack.shape[1])
                layer.register_parameter(f"{name}_weight", nn.Parameter(dense.to(device), requires_grad=False))
            self._dense = UnquantizedFusedMoEMethod(self.moe)
            self._dense.process_weights_after_loading(layer)
            return
        products = {}
        for name, stack in stacks.items():
            weight = stack if isinstance(stack, Tensor) else PackedWeight.holding(stack, experts, exact=self.exact)
            products[name] = product_of(layer, weight, f"{name}_weight")
        layer.sparsify_products = products

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        if self._dense is not None:
            return self._dense.apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        return run_experts(layer, layer.sparsify_products, x, topk_weights, topk_ids)


def run_experts(layer: Any, products: dict[str, Product], x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """``x`` [tokens, hidden] through the chosen experts of this rank, tokens sorted by expert."""
    (tokens, chosen), experts = topk_ids.shape, layer.local_num_experts
    ids = topk_ids.reshape(-1).long()
    if layer.expert_map is not None:
        ids = layer.expert_map[ids].long()
        # Another rank's experts come last, past the last offset: products leave zeros there.
        ids = torch.where(ids < 0, experts, ids)
    ids, order = torch.sort(ids, stable=True)
    offsets = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True)
    weights = topk_weights.reshape(-1)[order].unsqueeze(-1)
    inputs = x[order // chosen]
    if layer.apply_router_weight_on_input:
        inputs = inputs * weights.to(x.dtype)
    gated = products["w13"](layer, inputs, offsets)
    inner = gated.new_empty(gated.shape[0], gated.shape[1] // 2)
    apply_moe_activation(layer.activation, inner, gated)
    y = products["w2"](layer, inner, offsets)
    if not layer.apply_router_weight_on_input:
        y = y * weights
    back = torch.empty_like(y)
    back[order] = y
    return back.view(tokens, chosen, -1).sum(1).to(x.dtype)
