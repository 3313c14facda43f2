"""Which sites a pass prunes, which it leaves dense, and why: decided before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import LinearSite, find_sites
from sparsify.analysis.tables import find_tables
from sparsify.analysis.zeros import always_zero
from sparsify.errors import Refused, SpecError
from sparsify.ir.program import Program
from sparsify.method.pattern import Grid, Pattern
from sparsify.prune.names import Wanted

# The code of a site that stays dense because --only names others.
NOT_NAMED = "not-named"
# Of a weight whose rows the pattern cannot be laid on.
UNFIT = "unfit"


@dataclass(frozen=True)
class Target:
    """A parameter that will be pruned, with all the sites that read it.

    ``sources`` are the checkpoint tensors that may change: None for all of them, fewer where a name pattern chose
    some experts of a stack. ``table``: whether an embedding looks its rows up, so that it is the input of all.
    """

    parameter: str
    sites: tuple[LinearSite, ...]
    sources: frozenset[str] | None = None
    table: bool = False

    @property
    def site(self) -> LinearSite:
        return self.sites[0]


def choose(program: Program, pattern: Pattern | Grid, wanted: Wanted) -> tuple[list[Target], list[Refused]]:
    """Split the parameters of ``program``'s linear sites into targets and those that stay dense, with the reason.

    By default every linear site inside a repeated block is a target, as in the papers; where a model
    has no blocks, every site is. Blocks that make something of images or sound for a language model stay dense, and
    so do buffers. ``only`` replaces that default, ``ignore`` takes away from either. Embeddings, and weights that they
    share, are targets of what rounds them (``pattern`` a :class:`Grid`) where ``only`` names them, and of nothing else.

    Parts of the model that the captured inputs do not run (a vision tower, of text alone) are among what stays dense.

    Raises:
        SpecError: no target is left, or ``only`` names what does not run alone.
    """
    sites, _ = find_sites(program)
    shared = read_elsewhere(program, sites)
    held = (n for n in program.graph.nodes if n.op == "get_attr" and n.meta.get("buffer"))
    buffers = {program.weights.canonical(str(n.target)) for n in held}
    blocks, beside = any(site.block for site in sites), _towers(program, sites)
    only = wanted.only
    by_parameter: dict[str, list[LinearSite]] = {}
    for site in sites:
        by_parameter.setdefault(site.parameter, []).append(site)
    # A row that is looked up keeps its length, whatever it is rounded to; zeros in it would be another token's.
    tables = find_tables(program) if only is not None and isinstance(pattern, Grid) else {}
    for parameter, site in tables.items():
        if only is not None and only & frozenset(program.weights.sources(parameter)):
            by_parameter.setdefault(parameter, [site])

    targets, skipped = [], []
    for parameter, own in by_parameter.items():
        site, sources = own[0], frozenset(program.weights.sources(parameter))
        chosen = (sources if only is None else sources & only) - wanted.ignored
        reason, code = None, ""
        if parameter in shared and parameter not in tables:
            reason = f"shared with {shared[parameter]}: what is done to it would be done to that too"
        elif parameter not in tables and all(always_zero(one.activation) for one in own):
            reason = "its input is zero whatever the model is given"
        elif only is not None and not sources & only:
            reason, code = "not named by --only", NOT_NAMED
        elif not chosen:
            reason = "named by --ignore"
        elif only is None and blocks and site.block is None:
            reason = "outside the repeated blocks (head or projection); name it with --only to prune it"
        elif only is None and site.block in beside:
            reason = f"reads {beside[site.block]} for the language model; name it with --only to prune it"
        elif only is None and site.window is not None:
            reason = "a convolution with a kernel; name it with --only to prune it"
        elif only is None and parameter in buffers:
            reason = "a buffer, such as a codebook, and no parameter; name it with --only to prune it"
        elif only is None and site.router:
            reason = "a router, which chooses experts; name it with --only to prune it"
        else:
            reason, code = pattern.unfit(site.shape[1]), UNFIT
        if reason:
            skipped.append(Refused(reason, site.name, code))
        else:
            some = None if chosen == sources else chosen
            targets.append(Target(parameter, tuple(own), some, parameter in tables))
    skipped += not_run(program, wanted)
    if not targets:
        # What was asked for first: a model has many sites that were not.
        first = sorted(skipped, key=lambda s: s.code == NOT_NAMED)[:3]
        reasons = "; ".join(f"{s.node}: {s.reason}" for s in first) or "the model has no linear site"
        verb, bare = ("rounding", "round") if isinstance(pattern, Grid) else ("pruning", "prune")
        raise SpecError(f"{verb} to {pattern}", found=f"nothing to {bare} ({reasons})", do="See sparsify inspect")
    return targets, skipped


def _towers(program: Program, sites: Sequence[LinearSite]) -> dict[str | None, str]:
    """Blocks that see none of the text that other blocks see beside what they see, with the inputs that they see."""
    inputs = Flow.of(program).inputs
    seen: dict[str | None, set[str]] = {}
    for site in sites:
        seen.setdefault(site.block, set()).update(inputs.get(site.activation, ()))
    with_text = [names for block, names in seen.items() if block is not None and "input_ids" in names]
    return {
        block: ", ".join(sorted(names))
        for block, names in seen.items()
        if block is not None and names and "input_ids" not in names and any(names < text for text in with_text)
    }


def not_run(program: Program, wanted: Wanted) -> list[Refused]:
    """Parts of the model with matrices that ``program`` does not read: what its inputs do not reach."""
    weights, read = program.weights, program.parameter_nodes().keys()
    # Every dotted beginning of the name of a parameter that is read.
    reached = {name[:at] for name in read for at, c in enumerate(name) if c == "."} | set(read)
    parts: dict[str, list[str]] = {}
    for name in weights.parameters():
        if name in read or len(weights.shape(name)) < 2:
            continue
        ends = [at for at, c in enumerate(name) if c == "."]
        part = next((name[:at] for at in ends if name[:at] not in reached), name)
        parts.setdefault(part, []).append(name)
    found = []
    for part, names in parts.items():
        sources = frozenset(source for name in names for source in weights.sources(name))
        named = wanted.only is None or bool(sources & wanted.only)
        reason = f"not run by these inputs ({len(names)} weights); calibrate on inputs that reach it to prune it"
        found.append(Refused(reason, part, "" if named else NOT_NAMED))
    return found


def read_elsewhere(program: Program, sites: Sequence[LinearSite]) -> dict[str, str]:
    """Parameters that something other than a linear site reads, with what it is."""
    own = {site.parameter for site in sites}
    found = {}
    for node in program.graph.nodes:
        name = program.parameter(node)
        if name is None or program.weights.canonical(name) not in own:
            continue
        for user in node.users:
            if "embedding" in str(user.target):
                found[program.weights.canonical(name)] = "the embedding"
    return found
