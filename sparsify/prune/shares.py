"""Which percentage each kind of layer gets, where a pass gives kinds their own (its option ``kinds``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparsify.errors import SpecError, near
from sparsify.method.pattern import belongs, parse_shares
from sparsify.method.weight_pass import MatrixPass, WeightPass
from sparsify.prune.targets import Target


def shared_out(weight_pass: MatrixPass, targets: Sequence[Target]) -> Mapping[str, MatrixPass]:
    """``weight_pass`` for each target's parameter, with the percentage of its kind; of several names that call a kind
    the longest counts.

    Raises:
        SpecError: a name that calls no kind of site that is pruned.
    """
    if not isinstance(weight_pass, WeightPass):
        return {target.parameter: weight_pass for target in targets}
    shares, used = parse_shares(weight_pass.kinds), set[str]()
    found = {}
    for target in targets:
        name = max((name for name in shares if belongs(target.site.kind, name)), key=len, default=None)
        found[target.parameter] = weight_pass
        if name is not None:
            used.add(name)
            found[target.parameter] = replace(weight_pass, pattern=shares[name], kinds="")
    if unknown := next((name for name in shares if name not in used), None):
        raise SpecError(
            f"{weight_pass.name}:…,kinds={weight_pass.kinds}",
            found=f"no kind of layer called {unknown} among those that are pruned",
            do=near(unknown, {target.site.kind.rpartition(".")[2] for target in targets}),
        )
    return found
