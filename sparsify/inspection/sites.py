"""``sparsify inspect``: a model's sites, groups, shapes and regions, to read, as JSON, or as a DOT graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import InputGroup, LinearSite, Opaque, find_sites, group_by_input
from sparsify.data.batches import example_batch
from sparsify.frontend.capture import Batch, capture
from sparsify.frontend.source import open_source


@dataclass(frozen=True)
class Inspection:
    """What the compiler sees in a model; ``tensors`` are the checkpoint tensors of each parameter."""

    name: str
    architecture: str
    parameters: int
    nodes: int
    sites: Sequence[LinearSite]
    groups: list[InputGroup]
    opaque: Sequence[Opaque]
    tensors: dict[str, list[str]]

    @property
    def blocks(self) -> dict[str, list[InputGroup]]:
        """Groups by the block they are in, in the order that blocks run."""
        found: dict[str, list[InputGroup]] = {}
        for group in self.groups:
            found.setdefault(group.block or "(outside the blocks)", []).append(group)
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "nodes": self.nodes,
            "sites": [
                {
                    "name": site.name,
                    "parameter": site.parameter,
                    "tensors": self.tensors[site.parameter],
                    "kind": site.kind,
                    "block": site.block,
                    "out_features": site.shape[0],
                    "in_features": site.shape[1],
                    "experts": site.experts if site.expert_axis is not None else None,
                    "axes": {"output": site.out_axis, "input": site.in_axis, "expert": site.expert_axis},
                    "operator": str(site.node.target),
                    "reads": site.activation.name,
                    "router": site.router,
                }
                for site in self.sites
            ],
            "input_groups": [
                {"reads": g.activation.name, "block": g.block, "sites": [s.name for s in g.sites]} for g in self.groups
            ],
            "regions": {
                "layer": [[s.name for s in g.sites] for g in self.groups],
                "block": [[s.name for g in groups for s in g.sites] for groups in self.blocks.values()],
            },
            "not_understood": [{"tensors": list(o.parameters), "reason": o.reason} for o in self.opaque],
        }

    def lines(self) -> list[str]:
        """The model in sentences."""
        text = [
            f"{self.name} ({self.architecture}): {self.parameters:,} parameters, {self.nodes} graph nodes, "
            f"{len(self.sites)} linear sites in {len(self.groups)} input groups and {len(self.blocks)} regions"
        ]
        for block, groups in self.blocks.items():
            text.append(f"{block}")
            for group in groups:
                text.append(f"  {group}")
                for site in group.sites:
                    note = ", chooses experts" if site.router else ""
                    text.append(f"    {site}{note}")
        text += [f"not prunable: {opaque}" for opaque in self.opaque]
        return text

    def dot(self) -> str:
        """The groups as a DOT graph: activations in ellipses, sites in boxes, blocks as clusters."""
        out = ["digraph sparsify {", "  rankdir=TB; node [fontsize=10];"]
        for number, (block, groups) in enumerate(self.blocks.items()):
            out += [f"  subgraph cluster_{number} {{", f"    label={_quote(block)};"]
            for group in groups:
                out.append(f"    {_quote(group.activation.name)} [shape=ellipse];")
                for site in group.sites:
                    label = f"{site.name}\\n{site.shape[0]}×{site.shape[1]}"
                    out.append(f"    {_quote(site.name)} [shape=box,label={_quote(label)}];")
                    out.append(f"    {_quote(group.activation.name)} -> {_quote(site.name)};")
            out.append("  }")
        order = [group for groups in self.blocks.values() for group in groups]
        for one, other in zip(order, order[1:], strict=False):
            out.append(f"  {_quote(one.sites[0].name)} -> {_quote(other.activation.name)} [style=dashed];")
        return "\n".join([*out, "}"]) + "\n"


def inspect(
    model: str | Path | nn.Module,
    *,
    batch: Batch | None = None,
    allow_bin: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
) -> Inspection:
    """Trace ``model`` without reading a weight and report its sites.

    Args:
        batch: inputs to trace it by, where its config does not tell them; only shapes and dtypes matter.
    """
    # Whoever looks at a model may look at a broken one.
    source = open_source(model, allow_bin=allow_bin, trust_remote_code=trust_remote_code, check=check, allow_nan=True)
    program = capture(source, batch or example_batch(source))
    flow = Flow.of(program)
    sites, opaque = find_sites(program)
    groups = sorted(group_by_input(sites), key=lambda g: flow.position[g.sites[0].node])
    return Inspection(
        source.name,
        type(source.module).__name__,
        sum(p.numel() for p in source.module.parameters()),
        len(program.nodes),
        sites,
        groups,
        opaque,
        {site.parameter: program.weights.sources(site.parameter) for site in sites},
    )


def _quote(text: str) -> str:
    return '"' + text.replace('"', r"\"") + '"'
