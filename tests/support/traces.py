"""Graphs traced once: tests build the same small models again and again, and ``torch.export`` takes half of all time.

A graph, of ours or of ONNX, depends on a module's code, structure, settings and buffers and on the shapes of a batch;
of its parameters on their shapes alone. Modules that are alike in all of these share one; whatever cannot be compared
is traced anew. What tests the tracing itself does without: :data:`ANEW`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import hashlib
import sys
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import GenerationConfig, PretrainedConfig

from sparsify.context import Progress, report
from sparsify.frontend.tracing.attempts import attempted
from sparsify.frontend.tracing.literal import could_be_literal
from sparsify.frontend.tracing.recurrences import FUNCTIONS

# Where vLLM is tested there is no onnx.
if TYPE_CHECKING:
    import onnx_ir as ir

    from sparsify.backends.onnx.options import Options
    from sparsify.backends.onnx.tracing.contract import Contract

    Graph = tuple[ir.Model, dict[str, ir.Value], Contract]

# Tests of the tracing itself, of what it reads, and of two runs that give the same: they trace anew.
ANEW = (
    *(f"tests/frontend/test_{what}" for what in ("capture", "computed", "drawn", "functional", "known", "matching")),
    *(f"tests/frontend/test_{what}" for what in ("modules", "recurrences", "vlms")),
    "tests/compiler/test_compile.py::test_dry_run_reads_no_weight",
    "tests/compiler/test_compile.py::test_two_runs_write_the_same_bytes",
    "tests/provenance/test_history.py::test_the_command_of_the_card_makes_the_same",
    "tests/hostile/test_models.py",
    "tests/tools",
)

Traced = tuple[torch.export.ExportedProgram, dict[str, Tensor]]
_PLAIN = (int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, types.BuiltinFunctionType)
# Whose code does not change while tests run: a class of a test may be another one under the same name.
_KNOWN = ("transformers.", "torch.nn.", "sparsify.")
# What is looked at by itself. Hooks are values like others: functions of a test's own, which are met once.
_PARTS = {"_parameters", "_buffers", "_modules"}
# Where a config comes from.
_WHENCE = {"_name_or_path", "name_or_path", "_original_object_hash", "_commit_hash"}
_MOST = 1 << 22


class Unlike(Exception):
    """Something that cannot be compared."""


@dataclass
class Traces:
    """What has been traced, by all that it depends on. ``anew``: trace, whatever is known."""

    anew: bool = False
    kept: dict[object, Traced] = field(default_factory=dict)
    graphs: dict[object, Graph] = field(default_factory=dict)

    def attempted(self, module: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> Traced:
        """:func:`sparsify.frontend.tracing.attempts.attempted`, which this stands for."""
        if self.anew:
            return attempted(module, batch, device)
        try:
            key = (_module(module), _batch(batch), str(device), torch.get_default_dtype())
        except Unlike:
            return attempted(module, batch, device)
        if key not in self.kept:
            self.kept[key] = attempted(module, batch, device)
            _keep()
        exported, literals = self.kept[key]
        return exported, dict(literals)

    def build_graph(
        self,
        module: nn.Module,
        batch: Mapping[str, Tensor],
        options: Options,
        names: Collection[str] = (),
        fixed: Mapping[str, Tensor] | None = None,
    ) -> Graph:
        """:func:`sparsify.backends.onnx.writing.build_graph`, which this stands for."""
        from sparsify.backends.onnx.writing import build_graph

        if self.anew:
            return build_graph(module, batch, options, names, fixed)
        # Where its weights lie is not the graph's.
        apart = dataclasses.replace(options, weights="link", dtype=None, values="auto", group=None, activations="int8")
        try:
            given = _batch(batch), {name: _held(value) for name, value in (fixed or {}).items()}
            key = (_module(module), repr(given), apart, tuple(names))
        except Unlike:
            return build_graph(module, batch, options, names, fixed)
        if key in self.graphs:
            report(Progress("exporting", what="the model's graph"))
            return _copy(self.graphs[key])
        made = build_graph(module, batch, options, names, fixed)
        self.graphs[key] = _copy(made)
        _keep()
        return made


def _keep() -> None:
    """What is kept, and what torch imports on the way, need not be searched by any collection after this one."""
    gc.collect()
    gc.freeze()


def _copy(graph: Graph) -> Graph:
    """``graph`` for a writer, who puts weights into it. Its parameters hang on nothing, and would not be copied."""
    model, parameters, contract = graph
    model.graph.inputs.extend(parameters.values())
    copied = model.clone()
    # A clone's values share their types with the values that they are of, and writers change some.
    for value in (*copied.graph.inputs, *(out for node in copied.graph.all_nodes() for out in node.outputs)):
        value.type = copy.copy(value.type)
    named = {value.name: value for value in copied.graph.inputs}
    found = {name: named[value.name] for name, value in parameters.items()}
    for each, values in ((model, parameters), (copied, found)):
        for value in values.values():
            each.graph.inputs.remove(value)
    return copied, found, contract


def _module(module: nn.Module) -> object:
    """All of ``module`` but what its parameters hold."""
    parts, first = [], dict[int, str]()
    # Parts by what they are called, and configs by what they say: many parts have the same.
    known: dict[int, object] = {id(part): name for name, part in module.named_modules()}
    for name, part in module.named_modules(remove_duplicate=False):
        kind = type(part)
        if known[id(part)] != name:
            parts.append((name, known[id(part)]))
            continue
        file = sys.modules.get(kind.__module__)
        if not kind.__module__.startswith(_KNOWN) or any(hasattr(file, function) for function in FUNCTIONS):
            raise Unlike(kind)
        own = tuple(
            (key, _value(value, known)) for key, value in sorted(vars(part).items()) if key not in _PARTS | _WHENCE
        )
        parts.append((name, kind, kind.forward, own, tuple(_tensors(part, name, first))))
    return tuple(parts)


def _tensors(part: nn.Module, at: str, first: dict[int, str]) -> Iterable[object]:
    for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
        if tensor is None:
            yield name, None
            continue
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer, FakeTensor):
            raise Unlike(type(tensor))
        yield name, first.setdefault(id(tensor), f"{at}.{name}"), _shape(tensor)
        if name in part._buffers:
            yield _held(tensor)


def _shape(tensor: Tensor) -> object:
    return tensor.shape, tensor.dtype, str(tensor.device), tensor.stride(), tensor.requires_grad, type(tensor)


def _held(tensor: Tensor) -> str:
    """What ``tensor`` holds; nothing where it has no numbers."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return ""
    if tensor.numel() > _MOST:
        raise Unlike
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _batch(batch: Mapping[str, Tensor]) -> object:
    literal = could_be_literal(batch)
    return tuple(
        (name, value.shape, value.dtype, value.stride(), value.is_meta, _held(value) if name in literal else "")
        for name, value in batch.items()
    )


def _value(value: Any, known: dict[int, object]) -> object:
    """``value`` as something that compares and hashes. ``known``: what has been met before, by its id."""
    if isinstance(value, nn.Module) and id(value) in known:
        return known[id(value)]
    if isinstance(value, (*_PLAIN, type)):
        return type(value), value
    if isinstance(value, (PretrainedConfig, GenerationConfig)):
        if id(value) not in known:
            said = {name: one for name, one in sorted(vars(value).items()) if name not in _WHENCE}
            known[id(value)] = type(value), _value(said, known)
        return known[id(value)]
    if isinstance(value, (tuple, list, set, frozenset)):
        return type(value), tuple(_value(each, known) for each in value)
    if isinstance(value, Mapping):
        return type(value), tuple((key, _value(each, known)) for key, each in value.items())
    if type(value).__module__.startswith("sparsify."):
        return type(value), _value(vars(value), known)
    if isinstance(value, functools.partial):
        return _value((value.func, value.args, value.keywords), known)
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        return value
    raise Unlike(type(value))
