"""From an activation in the graph to rows [tokens, in_features] with padding left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import InputGroup
from sparsify.errors import CalibrationError
from sparsify.ir.operators import GROUPED_PRODUCTS, argument, operator_name
from sparsify.ir.program import Program

aten = torch.ops.aten

# Inputs of towers that read images, beside which an attention mask is of the text.
_OF_IMAGES = re.compile(r"pixel_.*|image_.*|video_.*|aspect_ratio_.*|spatial_shapes")
_ELEMENTWISE_VIEWS = {aten.to, aten.contiguous, aten.clone, aten._to_copy}


class RowReader:
    """Reads the input of a group as rows, honouring attention masks and the routing of experts.

    A token counts unless its attention mask is 0: ``attention_mask`` for what depends on encoder (or the only)
    inputs, ``decoder_attention_mask`` for what depends on decoder inputs. What depends on images alone has no tokens of
    text, and all of it counts.
    """

    def __init__(self, program: Program, flow: Flow, groups: Sequence[InputGroup]) -> None:
        self.program, self.flow = program, flow
        self._routes = self._find_routes()
        # Until which positions they are looked at: some have been read for the last time by the graph before.
        self.held: dict[fx.Node, list[int]] = {}
        for group in groups:
            first = min(flow.position[site.node] for site in group.sites)
            for node in self._needed(group):
                # One before its first site too: for the last site that is looked at nothing is kept.
                self.held.setdefault(node, []).extend((flow.position[self.anchor(group)], first - 1, first))

    def anchor(self, group: InputGroup) -> fx.Node:
        """The last of the nodes that reading ``group`` needs: once it is computed, all are."""
        return max(self._needed(group), key=lambda node: self.flow.position[node])

    def _needed(self, group: InputGroup) -> list[fx.Node]:
        offsets = group.sites[0].offsets
        nodes = [group.activation, offsets, self._routes.get(offsets) if offsets is not None else None]
        return [node for node in nodes if node is not None]

    def tokens(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens of a batch that count, for progress alone."""
        mask = batch.get("attention_mask")
        if mask is not None:
            return int((mask != 0).sum())
        first = next(iter(batch.values()))
        return first.shape[0] * (first.shape[1] if first.dim() == 2 else 1)

    def read(
        self, group: InputGroup, batch: Mapping[str, Tensor], values: Mapping[fx.Node, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows of ``group`` in one batch; for experts, where each expert's rows end (on the CPU, for Python cuts them)
        and which token each row is.

        The tokens are None where the rows of experts cannot be traced back to them.

        Raises:
            CalibrationError: the attention mask cannot be matched to the activation.
        """
        site = group.sites[0]
        value: Tensor = values[group.activation]
        counted = self._counted(group, batch)
        if site.window is not None:
            if counted is not None:
                raise self._unmatched(group, value, counted)
            rows = site.window.rows(value)
            if not site.window.depthwise:
                return rows, None, None
            return rows.flatten(0, 1), torch.arange(1, site.experts + 1) * rows.shape[1], None
        moved = value.movedim(group.feature_dim, -1)
        if (site.expert_axis is not None or site.grouped) and site.offsets is None:
            # One batched product: the first axis is the expert (the group), every expert sees as many rows.
            rows = moved.reshape(-1, moved.shape[-1])
            if counted is not None:
                raise self._unmatched(group, value, counted)
            return rows, torch.arange(1, site.experts + 1) * moved.shape[1], None
        rows = moved.reshape(-1, moved.shape[-1])
        ends: Tensor | None = values[site.offsets].cpu() if site.offsets is not None else None
        tokens: Tensor | None = None
        if site.offsets is not None and site.offsets in self._routes:
            tokens = values[self._routes[site.offsets]].reshape(-1)
        if counted is None:
            return rows, ends, tokens
        # Which rows count is found on the CPU, where the mask is: a GPU that is asked how many stands still.
        flat = counted.reshape(-1)
        if tokens is not None:
            flat = flat[tokens.cpu()]
        if flat.numel() != len(rows):
            raise self._unmatched(group, value, counted)
        if ends is not None:
            before = torch.cat([torch.zeros(1, dtype=torch.long), flat.long().cumsum(0)])
            ends = before[ends.long()]
        index = flat.nonzero().flatten().to(rows.device, non_blocking=True)
        return rows[index], ends, None if tokens is None else tokens[index]

    def _counted(self, group: InputGroup, batch: Mapping[str, Tensor]) -> Tensor | None:
        # What no batch changes is no token's, and counts once for each batch.
        depends = self.flow.inputs.get(group.activation, frozenset())
        if all(_OF_IMAGES.fullmatch(name) for name in depends):
            return None
        decoder = any(name.startswith("decoder_") for name in depends)
        mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
        if mask is None or mask.dim() != 2:
            return None
        counted = mask != 0
        return None if bool(counted.all()) else counted

    def _find_routes(self) -> dict[fx.Node, fx.Node]:
        """For each offsets node of a stack of experts, the index that gathered its rows from the tokens."""
        routes: dict[Any, Any] = {}
        for node in self.program.graph.nodes:
            if node.op != "call_function" or operator_name(node) not in GROUPED_PRODUCTS:
                continue
            x, offsets = node.args[0], node.args[2]
            while isinstance(x, fx.Node) and getattr(x.target, "_overloadpacket", None) in _ELEMENTWISE_VIEWS:
                x = x.args[0]
            if not isinstance(x, fx.Node):
                continue
            packet = getattr(x.target, "_overloadpacket", None)
            if packet is aten.index and len(argument(x, 1)) == 1:
                routes[offsets] = argument(x, 1)[0]
            elif packet is aten.index_select and x.args[1] == 0:
                routes[offsets] = x.args[2]
        return routes

    def _unmatched(self, group: InputGroup, value: Tensor, mask: Tensor) -> CalibrationError:
        return CalibrationError(
            f"the attention mask {tuple(mask.shape)} at {group.name}",
            found=f"an activation of shape {tuple(value.shape)}, whose padded rows cannot be told",
            do="Calibrate with sequences of full length, without padding",
        )
