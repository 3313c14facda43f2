"""Parameters of a captured model, read from and written to the tensors of its checkpoint.

A checkpoint often names or cuts its tensors otherwise than the running model: Mixtral stores each expert apart, ViT
renames its projections. ``transformers`` knows the conversions; this file applies them to one parameter at a time,
forwards to read and backwards to write, so that nothing but that parameter is in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from sparsify.ir.store import TensorStore


@dataclass
class Conversion:
    """Checkpoint tensors that together become parameters, by way of a ``transformers`` converter.

    ``sources`` are (checkpoint name, converter's pattern); ``targets`` are parameter names, ``shapes`` theirs.
    """

    converter: Any
    sources: list[tuple[str, str]]
    targets: list[str] = field(default_factory=list)
    shapes: dict[str, torch.Size] = field(default_factory=dict)


class Weights:
    """Read and write parameters by their name in the model (its fully qualified name).

    Args:
        store: where the checkpoint's tensors lie.
        renamed: parameter name to checkpoint name, for those that are one tensor.
        converted: parameter name to its conversion, for the others.
        aliases: parameter name to the parameter that it is tied to.
        model: the module, needed to convert backwards. ``transforms``: what of transformers' mapping was used.
        twins: parameter name to further tensors that hold the same numbers, where a file has what is tied twice.

    Attributes:
        unknown: tensors of the store that are no parameter's. untied: parameters that the config ties to another and
            whose tensors differ from that one's.
    """

    def __init__(
        self,
        store: TensorStore,
        renamed: Mapping[str, str],
        converted: Mapping[str, Conversion] | None = None,
        aliases: Mapping[str, str] | None = None,
        model: nn.Module | None = None,
        transforms: list[Any] | None = None,
        twins: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.store = store
        self.aliases = dict(aliases or {})
        # Parameters that were written to since this was made.
        self.written: set[str] = set()
        self._renamed = dict(renamed)
        self._converted = dict(converted or {})
        self._model = model
        self._transforms = transforms
        self._twins = dict(twins or {})
        self.unknown: tuple[str, ...] = ()
        self.untied: frozenset[str] = frozenset()

    def on(self, store: TensorStore) -> Weights:
        """The same parameters over another store with the same tensors."""
        new = Weights(store, self._renamed, self._converted, self.aliases, self._model, self._transforms, self._twins)
        new.unknown, new.untied = self.unknown, self.untied
        return new

    def canonical(self, name: str) -> str:
        return self.aliases.get(name, name)

    def __contains__(self, name: str) -> bool:
        name = self.canonical(name)
        return name in self._renamed or name in self._converted

    def parameters(self) -> list[str]:
        """Names of all parameters, ties counted once."""
        return [*self._renamed, *self._converted]

    def sources(self, name: str) -> list[str]:
        """Names of the checkpoint tensors that hold parameter ``name``."""
        name = self.canonical(name)
        if name in self._converted:
            return [source for source, _ in self._converted[name].sources]
        return [self._renamed[name], *self._twins.get(name, ())]

    def conversion(self, name: str) -> Conversion | None:
        """How parameter ``name`` is made of several checkpoint tensors; None where it is one of them."""
        return self._converted.get(self.canonical(name))

    def shape(self, name: str) -> torch.Size:
        """The shape of parameter ``name``, found without reading it."""
        name = self.canonical(name)
        if name in self._converted:
            return self._converted[name].shapes[name]
        return self.store.shape(self._renamed[name])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the checkpoint stores parameter ``name``."""
        return self.store.dtype(self.sources(name)[0])

    def read(self, name: str) -> Tensor:
        """Return parameter ``name`` as stored, in the checkpoint's dtype."""
        name = self.canonical(name)
        if name in self._converted:
            return self._convert(self._converted[name])[name]
        return self.store.read(self._renamed[name])

    def write(self, name: str, tensor: Tensor, only: set[str] | None = None) -> None:
        """Store parameter ``name``; of several checkpoint tensors, only those named in ``only``.

        Raises:
            CheckpointError: the conversion cannot be reversed exactly.
        """
        name = self.canonical(name)
        self.written.add(name)
        if name not in self._converted:
            self.store.write(self._renamed[name], tensor)
            for twin in self._twins.get(name, ()):
                self.store.write(twin, tensor.to(self.store.dtype(twin)))
            return
        conversion = self._converted[name]
        parts = {name: tensor}
        if len(conversion.targets) > 1:
            parts = self._convert(conversion) | parts
        reverted = self._revert(parts)
        known = {source for source, _ in conversion.sources}
        if reverted.keys() != known:
            raise CheckpointError(
                f"writing {name}",
                found=f"transformers turns it back into {sorted(reverted)[:3]}…, the folder holds {sorted(known)[:3]}…",
                do="Save the model again with this version of transformers, then prune that folder",
            )
        for source, value in reverted.items():
            if only is None or source in only:
                self.store.write(source, value.to(self.store.dtype(source)).contiguous())
        back = self.read(name)
        if only is None and not (torch.equal(back, tensor) or torch.equal(back.nan_to_num(), tensor.nan_to_num())):
            raise CheckpointError(
                f"writing {name}",
                found="reading it back gives other values",
                do="This conversion does not reverse; ignore this parameter with --ignore",
            )

    def made_together(self, name: str) -> list[str]:
        """The parameters that one conversion makes of the same checkpoint tensors, ``name`` among them."""
        name = self.canonical(name)
        targets = self._converted[name].targets if name in self._converted else [name]
        return [self.canonical(target) for target in targets]

    def stored(self, parts: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The checkpoint's tensors for ``parts`` in the place of the parameters that are
        :meth:`made_together`, which may have other shapes: those of a model of this ``config``.
        """
        name = next(iter(parts))
        if name not in self._converted:
            return {self._renamed[name]: parts[name]}
        return self._revert(dict(parts), config)

    def _revert(self, parts: dict[str, Tensor], config: Any = None) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        # transformers looks for the conversions of a load on the model; the user's own stays as it was.
        model: Any = copy.copy(self._model)
        model._weight_conversions = self._transforms
        if config is not None:
            model.config = config
        reverted: dict[str, Tensor] = revert_weight_conversion(model, parts)
        return reverted

    def _convert(self, conversion: Conversion) -> dict[str, Tensor]:
        return run_converter(conversion, {name: self.store.read(name) for name, _ in conversion.sources}, self._model)


def run_converter(conversion: Conversion, tensors: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
    """Apply a conversion to the tensors of its sources; the result is keyed by parameter name.

    Raises:
        CheckpointError: tensors of which the conversion makes nothing.
    """
    converter = copy.deepcopy(conversion.converter)
    for name, pattern in conversion.sources:
        converter.add_tensor(conversion.targets[0], name, pattern, tensors[name])
    config = getattr(model, "config", None)
    try:
        result = converter.convert(conversion.targets[0], model=model, config=config)
    except Exception as error:  # what its operations say of shapes that do not fit
        raise CheckpointError(
            f"parameter {conversion.targets[0]}",
            found=f"transformers cannot make it of {conversion.sources[0][0]}, "
            f"{list(tensors[conversion.sources[0][0]].shape)} ({first_line(error)})",
            do="Does config.json belong to these weights?",
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Each parameter or buffer name that is another's tensor, with the first name of that tensor."""
    first: dict[int, str] = {}
    aliases = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases
