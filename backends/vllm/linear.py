"""Linear layers and output heads of vLLM over packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from sparsify.backends.vllm.matrices import Awaited, columns_cut, converted, fitting, lost, rows_cut
from sparsify.backends.vllm.products import OnDevice, hold, run
from sparsify.backends.vllm.shares import Share, columns_of_layer, places_of, rows_of_layer
from sparsify.errors import CheckpointError
from sparsify.runtime.layout import Packed
from sparsify.runtime.shard import with_rows


class Arrivals:
    """What a layer has been given of its matrices, cut for this rank as soon as one is complete.

    Args:
        awaited: the matrices of the checkpoint. rows: of each matrix that the layer is fused of, which are this rank's.
    """

    def __init__(self, awaited: Sequence[Awaited], rows: Sequence[Share], columns: Share, dtype: torch.dtype) -> None:
        self.awaited, self.rows, self.columns, self.dtype = list(awaited), list(rows), columns, dtype
        self.parts: list[Packed | Tensor | None] = [None] * len(rows)
        self._places = _places(self.awaited, [share.whole for share in rows])

    def load(self, tensor_name: str, parameter: nn.Parameter, tensor: Tensor, key: Any = None) -> None:
        """What vLLM calls for each tensor of the layer: a ``weight_loader``.

        Raises:
            CheckpointError: a tensor that is not one of these matrices.
        """
        places = places_of(key, len(self.rows))
        which = next((a for a, own in zip(self.awaited, self._places, strict=True) if own == places), None)
        if which is None:
            raise CheckpointError(
                f"packed parameters {', '.join(a.name for a in self.awaited)}",
                found=f"vLLM loads shard {key!r} of {len(self.rows)}, which none of them is",
                do="Serve the folder with `sparsify serve`, or keep this layer dense and pack it again",
            )
        matrix = which.add(tensor_name, tensor)
        if matrix is None:
            return
        shares = [self.rows[place] for place in places]
        expected = (sum(share.whole for share in shares), self.columns.whole)
        fitting(which.name, matrix.shape, expected)
        matrix, start = converted(matrix, self.dtype), 0
        if (self.columns.first, self.columns.count) != (0, self.columns.whole):
            matrix = columns_cut(matrix, self.columns.first, self.columns.count)
        for place, share in zip(places, shares, strict=True):
            self.parts[place] = rows_cut(matrix, start + share.first, share.count)
            start += share.whole

    def complete(self) -> list[Packed | Tensor]:
        """Every part, in the order of the layer. They are kept no longer: vLLM keeps what loads a layer's parameters.

        Raises:
            CheckpointError: tensors that did not come.
        """
        found = [part for part in self.parts if part is not None]
        if len(found) < len(self.parts):
            missing = [
                name
                for each, places in zip(self.awaited, self._places, strict=True)
                if any(self.parts[place] is None for place in places)
                for name in each.missing
            ]
            raise lost(missing[0])
        self.parts = [None] * len(self.rows)
        return found


class SparsifyLinearMethod(LinearMethodBase):
    """Column and row parallel, merged, QKV and replicated layers, of which some matrices are packed.

    Args:
        awaited: the matrices of the checkpoint that the layer is fused of. exact, policy, tune: as :class:`OnDevice`.
    """

    def __init__(self, awaited: Sequence[Awaited], **how: Any) -> None:
        self.awaited, self.how = list(awaited), how

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        rows = rows_of_layer(layer, output_partition_sizes)
        columns = columns_of_layer(layer, input_size_per_partition, input_size)
        expect(layer, Arrivals(self.awaited, rows, columns, params_dtype))

    def process_weights_after_loading(self, layer: Any) -> None:
        settle(layer, layer.sparsify_arrivals.complete(), self.awaited[0].name, self.how)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return run(layer, layer.sparsify_products, x, bias)


class SparsifyHeadMethod(SparsifyLinearMethod):
    """The output head, whose rows are a rank's part of the vocabulary and zeros that fill it up."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        cut, name = layer.shard_indices, self.awaited[0].name
        count = cut.org_vocab_end_index - cut.org_vocab_start_index
        if count < 1 or layer.num_added_embeddings:
            raise CheckpointError(
                f"packed parameter {name}",
                found=f"rank {layer.tp_rank} of {layer.tp_size} has {count} rows of {layer.org_vocab_size}",
                do="Serve it by fewer ranks",
            )
        rows = Share(layer.org_vocab_size, cut.org_vocab_start_index, count)
        expect(layer, Arrivals(self.awaited, [rows], Share(input_size, 0, input_size), params_dtype))

    def process_weights_after_loading(self, layer: Any) -> None:
        (part,) = layer.sparsify_arrivals.complete()
        rows = layer.num_embeddings_per_partition
        if isinstance(part, Packed):
            part = with_rows(part, rows)
        else:
            part = nn.functional.pad(part, (0, 0, 0, rows - part.shape[0]))
        settle(layer, [part], self.awaited[0].name, self.how)


def expect(layer: Any, arrivals: Arrivals) -> None:
    """Give ``layer`` a parameter for each tensor that may come; empty ones, which vLLM does not miss."""
    layer.sparsify_arrivals = arrivals
    for name, kind in arrivals.awaited[0].tensors.items():
        parameter = nn.Parameter(torch.empty(0, dtype=kind or arrivals.dtype), requires_grad=False)
        parameter.weight_loader = partial(arrivals.load, name)  # type: ignore[attr-defined]
        # Where a model of vLLM's brings the rows of a tensor into another order (Falcon), it asks which axis they are.
        parameter.output_dim = 0  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)


def settle(layer: Any, parts: Sequence[Packed | Tensor], name: str, how: dict[str, Any]) -> None:
    """Put what came in the place of what was empty."""
    device = layer.weight.device
    for tensor_name in layer.sparsify_arrivals.awaited[0].tensors:
        delattr(layer, tensor_name)
    del layer.sparsify_arrivals
    layer.sparsify_products = hold(layer, name, parts, OnDevice(device, **how))


def _places(awaited: Sequence[Awaited], wholes: Sequence[int]) -> list[tuple[int, ...]]:
    """Which of the matrices that a layer is fused of each of the checkpoint's is; several where it is fused on disk.

    Raises:
        CheckpointError: their rows are not the layer's.
    """
    if len(awaited) == 1:
        return [tuple(range(len(wholes)))]
    if len(awaited) == len(wholes):
        return [(place,) for place in range(len(wholes))]
    found, start = [], 0
    for each in awaited:
        end = start
        while each.rows is not None and end < len(wholes) and sum(wholes[start:end]) < each.rows:
            end += 1
        if sum(wholes[start:end]) != each.rows:
            raise CheckpointError(
                f"packed parameter {each.name}",
                found=f"vLLM fuses {len(awaited)} parameters into {len(wholes)}, of {list(wholes)} rows",
                do="Keep all of them dense, or all packed, and pack the folder again",
            )
        found.append(tuple(range(start, end)))
        start = end
    return found
