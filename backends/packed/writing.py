"""Every tensor of a packed folder into its files, and read back from there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparsify.backends.packed.choosing import Decision
from sparsify.backends.packed.format import PackedSite, pack_parameter
from sparsify.backends.packed.grids import integers_of
from sparsify.backends.packed.store import PackedStore
from sparsify.context import counted
from sparsify.errors import BackendError
from sparsify.files.writer import lay_out
from sparsify.ir.weights import Weights
from sparsify.tensors import same_bits


def write_packed(folder: Path, weights: Weights, decisions: Iterable[Decision]) -> dict[str, str]:
    """Every tensor into ``folder``, parameters under the model's own names; the digest of each."""
    packed = {d.name: d for d in decisions if d.site is not None}
    tensors: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for name in weights.parameters():
        site = packed[name].site if name in packed else None
        if site is not None:
            for part, (shape, kind) in site.parts.items():
                tensors[name + part] = (kind or weights.dtype(name), shape)
        else:
            tensors[name] = (weights.dtype(name), list(weights.read(name).shape))
    # What the checkpoint holds beside the parameters is carried along.
    known = {source for name in weights.parameters() for source in weights.sources(name)}
    others = [n for n in weights.store.names() if n not in known and n not in tensors]
    tensors |= {n: (weights.store.dtype(n), list(weights.store.shape(n))) for n in others}
    out = lay_out(folder, tensors)
    for name in counted("packing", weights.parameters()):
        decision = packed.get(name)
        if decision is None or decision.site is None:
            out.write(name, weights.read(name).to(weights.dtype(name)))
            continue
        for part, tensor in packed_again(decision.site, decision.linear.matrices(weights.read(name))).items():
            out.write(name + part, tensor)
    for name in counted("writing", others):
        out.write(name, weights.store.read(name))
    return dict(out.written)


def packed_again(site: PackedSite, matrices: Tensor) -> dict[str, Tensor]:
    """The tensors of ``site``, which was chosen for ``matrices`` [experts, out_features, in_features].

    Raises:
        BackendError: they are not those that it was chosen for.
    """
    flat = matrices.reshape(-1, matrices.shape[-1])
    own = flat if site.bits is None else integers_of(flat, site.bits, site.group)
    if own is None:
        raise BackendError(
            f"packing a matrix {list(flat.shape)}", found=f"values off its grid of {site.bits} bits", do="Report a bug"
        )
    return pack_parameter(own, site.layout, experts=site.experts, transposed=site.transposed)[1]


def differences(store: PackedStore, weights: Weights, sums: Mapping[str, str]) -> Iterable[tuple[str, str, str]]:
    """What lies in the files otherwise than it was meant: the tensor, what was found, what to do."""
    for name, found in store.checkpoint.digests(sums).items():
        if found != sums[name]:
            yield name, "reads back otherwise than it was written", "Check the disk and run again"
    for name in counted("checking", store.sites):
        # Equal as numbers: a pruned weight may be -0.0, which is packed as zero.
        if not same_bits(store.read(name), weights.read(name)):
            yield name, "unpacks to other values", "Report this as a bug"
