"""From a model to a :class:`Program`: export with fake parameters, then rewrite for a real device.

``torch.export`` traces every architecture that we know bit for bit. What it leaves behind is put right here:
devices named in the graph, wrappers, operators that do nothing, and which tensor is a parameter.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from sparsify.context import Progress, report
from sparsify.errors import TraceError
from sparsify.frontend.matching import weights_of_module
from sparsify.frontend.source import Source
from sparsify.frontend.tracing.attempts import Batch, attempted
from sparsify.frontend.tracing.caches import without_cache
from sparsify.frontend.tracing.functional import without_writes
from sparsify.frontend.tracing.mends import mended
from sparsify.frontend.tracing.recurrences import kept_whole
from sparsify.frontend.tracing.ways import without_ways
from sparsify.host import quiet, release_freed, young_heap
from sparsify.ir.graph import empty_root, inline
from sparsify.ir.operators import placed
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights

aten = torch.ops.aten


def capture(source: Source, batch: Batch) -> Program:
    """Trace the model of ``source`` at the shapes of ``batch``.

    Args:
        batch: input name to tensor; digits name positional inputs. Only shapes and dtypes matter.

    Raises:
        TraceError: the model cannot be exported, needs values that only a run could give, or reads nothing of an input.
    """
    report(Progress("tracing", what=source.name))
    module = source.running()
    with young_heap():
        with kept_whole(module) as recurrences:
            exported, literals = export(module, batch)
            recurrences.write_into(exported.graph)
        program = from_exported(exported, source.weights, constants=_real_tensors(module))
        program.model, program.literals = type(source.module).__name__, literals
        _check_read(program, source.module)
        del exported
        # Exporting leaves reference cycles as large as the graph; a second capture would stack on them.
        gc.collect()
    release_freed()
    return program


def _check_read(program: Program, module: nn.Module) -> None:
    """A forward that takes any keyword (``**kwargs``) takes a misspelt mask, and never looks at it."""
    named = inspect.signature(module.forward).parameters
    unread = [str(name) for n in program.inputs if not n.users and (name := n.meta["input"]) not in named]
    if unread := [name for name in unread if not name.isdigit()]:
        raise TraceError(
            f"input {unread[0]} of {program.model}",
            found="nothing in the model reads it",
            do=f"Its forward names {', '.join(n for n, p in named.items() if p.kind is not p.VAR_KEYWORD)}",
        )


def export(module: nn.Module, batch: Batch) -> tuple[torch.export.ExportedProgram, dict[str, Tensor]]:
    """``module`` as torch exports it at the shapes of ``batch``, and the inputs whose numbers are in the graph, because
    they decide its shapes (see :mod:`sparsify.frontend.tracing.literal`).

    Raises:
        TraceError: it cannot be exported.
    """
    # Inputs lie where the module does; the program made of it is for no device.
    device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    training = module.training
    _set_mode(module, training=False)
    try:
        # Where export gives up it prints the graph so far, which is of no use to whoever has no such model in hand.
        with torch.no_grad(), quiet(), without_cache(module), mended(module, batch), redirect_stderr(StringIO()):
            return attempted(module, batch, device)
    finally:
        _set_mode(module, training=training)


def from_exported(
    exported: torch.export.ExportedProgram,
    weights: Weights | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> Program:
    """Turn an ExportedProgram into a :class:`Program`.

    Args:
        weights: where its parameters come from; its own state where None.
        constants: real values of buffers that the exported program holds on the meta device.

    Raises:
        TraceError: a tensor that the graph needs exists only on the meta device.
    """
    if weights is None:
        weights = weights_of_module(_StateHolder(exported))
    known = dict(constants or {})
    graph, env = fx.Graph(), cast(dict[fx.Node, Any], {})
    values: dict[str, Tensor] = {}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    names = iter(_leaf_names(exported.call_spec.in_spec))
    stand_ins: dict[str, Tensor] = {}
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        val = node.meta.get("val")
        if spec.kind is InputKind.USER_INPUT:
            name = next(names)
            if not isinstance(val, Tensor):
                env[node] = val
                continue
            env[node] = graph.placeholder(_identifier(name))
            env[node].meta["input"] = name
        else:
            target = weights.canonical(str(spec.target))
            if target not in weights:
                target = f"constants.{str(spec.target).replace('.', '_')}"
                values[target] = _constant(exported, str(spec.target), known)
            stand_ins.setdefault(target, val)
            env[node] = graph.get_attr(target)
            env[node].meta["buffer"] = spec.kind is InputKind.BUFFER
        env[node].meta["val"] = torch.empty(val.shape, dtype=val.dtype, device="meta")
    output = inline(exported.graph, exported.graph_module, graph, env, _does_nothing)
    graph.output(output)
    for node in graph.nodes:
        node.args, node.kwargs = placed(node, torch.device("cpu"))
    ways = without_ways(graph, lambda name: values[name] if name in values else weights.read(name))
    without_writes(graph)
    module = fx.GraphModule(empty_root(stand_ins), graph)
    for node in module.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "_schema", None) and not node.users:
            # Dead code is erased below unless it mutates; a mutation whose result is unused still counts.
            node.meta["impure"] = node.target._schema.is_mutable
    module.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or n.meta.get("impure", False))
    _drop_unread(module)
    program = Program(module, weights, values, _leaf_names(exported.call_spec.out_spec), ways=ways)
    program.verify()
    return program


def _set_mode(module: nn.Module, *, training: bool) -> None:
    try:
        module.train(training)
    except NotImplementedError:
        # An exported graph has its mode built in and refuses to be told.
        return


class _StateHolder(nn.Module):
    """The state of an exported program under a module's interface."""

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        super().__init__()
        self._named = dict(exported.named_parameters())
        self._buffered = dict(exported.named_buffers())

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self._named.items())

    def named_buffers(self, *_: Any, **__: Any) -> Any:
        return iter(self._buffered.items())


def _does_nothing(node: fx.Node) -> fx.Node | None:
    """The argument that equals ``node`` bit for bit whatever its value, or None."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    value, source = node.meta.get("val"), node.args[0].meta.get("val")
    if node.target in (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default):
        return node.args[0]
    if node.target is aten.dropout.default and node.args[2] is False:
        return node.args[0]
    if not isinstance(value, Tensor) or not isinstance(source, Tensor) or node.kwargs.get("copy"):
        return None
    if node.target is aten.to.dtype and value.dtype == source.dtype and len(node.args) < 4:
        return node.args[0]
    return None


def _constant(exported: torch.export.ExportedProgram, name: str, known: Mapping[str, Tensor]) -> Tensor:
    value = known.get(name)
    if value is None:
        value = exported.constants.get(name, exported.state_dict.get(name))
    if not isinstance(value, Tensor) or value.is_meta or isinstance(value, FakeTensor):
        raise TraceError(
            f"capturing {name}",
            found="a tensor made while tracing, whose numbers are lost",
            do="Pass the loaded module to sparsify.compile instead of its folder",
        )
    return value.detach().cpu()


def _real_tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in tensors if not isinstance(tensor, FakeTensor)}


def _leaf_names(spec: Any) -> list[str]:
    """Names of the leaves of an export's input or output structure: keywords by key, the rest by number."""
    if spec is None:
        return []
    numbered = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    if isinstance(numbered, tuple) and len(numbered) == 2 and isinstance(numbered[1], dict):
        args, kwargs = numbered
        pairs = [(i, str(n)) for n, i in enumerate(args)] + [(i, str(k)) for k, i in kwargs.items()]
        return [name for _, name in sorted((i, n) for i, n in pairs if isinstance(i, int))]
    paths = pytree.tree_flatten_with_path(numbered)[0]
    return [_last_key(path) if path else "0" for path, _ in paths]


def _last_key(path: tuple[Any, ...]) -> str:
    key = path[0]
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def _identifier(name: str) -> str:
    return f"input_{name}" if name.isdigit() else name


def _drop_unread(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.recompile()
