"""Which numbers of a block are trained: kept entries of pruned weights, norms and biases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import LinearSite, find_sites
from sparsify.calibration.measuring import measure_inputs
from sparsify.context import Context
from sparsify.errors import SpecError
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.method.selection import is_pruned
from sparsify.refine.regions import Block


class Trainable:
    """Per block, the parameters that may be trained, found without reading one.

    What several blocks read, what an embedding reads, buffers, routers and what ``left`` names (checkpoint tensors)
    stay as they are. The last block has the vectors between it and ``logits`` (the final norm) beside its own.
    """

    def __init__(self, program: Program, blocks: Sequence[Block], logits: fx.Node | None, left: frozenset[str]) -> None:
        self.program, self.weights = program, program.weights
        self.sites: dict[str, LinearSite] = {}
        for site in find_sites(program)[0]:
            if site.block is not None and not site.router:
                self.sites.setdefault(site.parameter, site)
        heads = {site.parameter for site in find_sites(program)[0] if site.block is None}
        flow, nodes = Flow.of(program), program.parameter_nodes()
        stops = [block.stop for block in blocks]
        if logits is not None:
            stops[-1] = flow.position[logits] + 1
        spans = [(0, blocks[0].start), *zip([block.start for block in blocks], stops, strict=True)]
        reads = [_reads(flow, start, stop) for start, stop in spans]
        everywhere = Counter(name for names in reads for name in names)
        self.matrices: list[list[str]] = []
        self.vectors: list[list[str]] = []
        for names in reads[1:]:
            own = [
                name
                for name in names
                if everywhere[name] == 1
                and not nodes[name].meta.get("buffer")
                and nodes[name].meta["val"].is_floating_point()
                and name in self.weights
                and left.isdisjoint(self.weights.sources(name))
            ]
            self.matrices.append([name for name in own if name in self.sites and name not in heads])
            self.vectors.append([n for n in own if n not in self.sites and nodes[n].meta["val"].dim() == 1])

    def any_pruned(self) -> bool:
        """Whether a linear weight of a block has zeros; reads until one is found."""
        return any(is_pruned(self.weights.read(name) != 0) for names in self.matrices for name in names)

    def check_pruned(self) -> None:
        """Raises:
        SpecError: nothing is pruned.
        """
        if not self.any_pruned():
            raise SpecError(
                f"refining {self.program.model or 'a graph'}",
                found="no linear weight in its blocks has zeros: nothing is pruned",
                do="Give a pass that prunes before it (--pass twin:2:4 --pass refine), or a folder that is pruned",
            )

    def equal(self, other: Weights) -> bool:
        """Whether ``other`` has the same values in every matrix of the blocks; reads until one differs."""
        names = [name for own in self.matrices for name in own]
        return all(
            name in other
            and other.shape(name) == self.weights.shape(name)
            and torch.equal(other.read(name), self.weights.read(name))
            for name in names
        )

    def kept(self, number: int, tokens: Mapping[str, Sequence[int]], *, every: bool) -> dict[str, Tensor | None]:
        """Of block ``number`` what is trained, by name: True where an entry may move, None where all may.

        Args:
            tokens: of stacks of experts, how many calibration tokens each saw. every: weights without zeros as well.
        """
        found: dict[str, Tensor | None] = {}
        for name in self.matrices[number]:
            mask = self.weights.read(name) != 0
            if is_pruned(mask) or every:
                found[name] = self._seen(name, mask, tokens.get(name))
        if found:
            found |= dict.fromkeys(self.vectors[number])
        return found

    def _seen(self, name: str, mask: Tensor, tokens: Sequence[int] | None) -> Tensor:
        """Without experts that saw fewer tokens than they have inputs, which would learn those by heart."""
        if tokens is None:
            return mask
        site = self.sites[name]
        few = torch.tensor([count < site.shape[1] for count in tokens])
        matrices = site.matrices(mask) & ~few[:, None, None]
        return site.layout(matrices, mask)


def expert_tokens(program: Program, batches: Sequence[Mapping[str, Tensor]], context: Context) -> dict[str, list[int]]:
    """How many tokens each expert of a stack is given, by parameter."""
    stacks = [site for site in find_sites(program)[0] if site.offsets is not None]
    if not stacks:
        return {}
    return {name: recorder.tokens for name, recorder in measure_inputs(program, stacks, batches, (), context).items()}


def _reads(flow: Flow, start: int, stop: int) -> list[str]:
    """Names of the parameters that what varies in [start, stop) reads, in its order."""
    nodes = [node for node in flow.order[start:stop] if node in flow.varying]
    named = (flow.parameters.get(argument, frozenset()) for node in nodes for argument in node.all_input_nodes)
    return list(dict.fromkeys(name for names in named for name in sorted(names)))
