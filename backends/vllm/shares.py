"""Which rows and columns of a layer's matrices a rank of vLLM's holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from sparsify.errors import BackendError

# What the shards of a fused layer are called, in their order.
_QKV = ("q", "k", "v")
_KNOWN = (QKVParallelLinear, MergedColumnParallelLinear, ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)


@dataclass(frozen=True)
class Share:
    """Of ``whole`` rows (or columns) of a matrix, ``count`` from ``first``."""

    whole: int
    first: int
    count: int


def rows_of_layer(layer: Any, output_partition_sizes: list[int]) -> list[Share]:
    """Of each of the matrices that ``layer`` is fused of, in their order.

    Raises:
        BackendError: a layer that cuts its weights in a way of its own.
    """
    kind = next((k for k in _KNOWN if isinstance(layer, k)), None)
    if kind is None or type(layer).weight_loader is not kind.weight_loader:
        raise BackendError(
            f"packed weights of {layer.prefix}",
            found=f"vLLM's {type(layer).__name__} cuts its weights in a way of its own",
            do="Serve the folder with `sparsify serve`, or keep this layer dense (--ignore) and pack it again",
        )
    if kind is QKVParallelLinear:
        heads = layer.total_num_heads * layer.head_size
        keys, values = (layer.total_num_kv_heads * size for size in (layer.head_size, layer.v_head_size))
        other = layer.tp_rank // layer.num_kv_head_replicas
        wholes, ranks = [heads, keys, values], [layer.tp_rank, other, other]
    elif kind in (RowParallelLinear, ReplicatedLinear):
        wholes, ranks = output_partition_sizes, [0] * len(output_partition_sizes)
    else:
        wholes = list(getattr(layer, "output_sizes", [layer.output_size]))
        ranks = [layer.tp_rank] * len(wholes)
    return [
        Share(whole, rank * count, count)
        for whole, rank, count in zip(wholes, ranks, output_partition_sizes, strict=True)
    ]


def columns_of_layer(layer: Any, input_size_per_partition: int, input_size: int) -> Share:
    rank = layer.tp_rank if input_size_per_partition != input_size else 0
    return Share(input_size, rank * input_size_per_partition, input_size_per_partition)


def places_of(key: Any, count: int) -> tuple[int, ...]:
    """Which of ``count`` matrices a loaded tensor of shard ``key`` is: vLLM says None for all of them."""
    if key is None:
        return tuple(range(count))
    if isinstance(key, str):
        return (_QKV.index(key),)
    return key if isinstance(key, tuple) else (key,)
