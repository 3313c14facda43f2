"""What a checkpoint calls the parameters of a packed folder.

A packed folder has the names that transformers' modules have; vLLM reads checkpoints by the names that they were
published with. Where the two differ, transformers' own conversion mapping says how, and is gone through backwards.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from sparsify.errors import BackendError

# What vLLM calls a checkpoint's stack of both halves of a gate, by what the checkpoint calls the halves.
_GATES: dict[tuple[str, ...], str] = {("gate_proj", "up_proj"): "gate_up_proj", ("w1", "w3"): "w13"}

# Stacks of experts that checkpoints have as such, and vLLM (GraniteMoE).
_STACKED = (
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
)
_PARAMETERS = {"gate_up_proj": "w13", "w13": "w13", "down_proj": "w2", "w2": "w2"}
_STACK = re.compile(rf"\.experts\.({'|'.join(_PARAMETERS)})(?=$|_)")


class CheckpointNames:
    """Renames as vLLM's ``WeightsMapper`` asks for it: one object in the place of transformers' ``WeightRenaming``.

    Args:
        config: of the model, as transformers has it. stacks: whether stacks that checkpoints have as such are called as
            vLLM calls those of others.
    """

    def __init__(self, config: Any, *, stacks: bool = True) -> None:
        self._steps = list(reversed(_conversions(config, stacks=stacks)))

    def rename_source_key(self, name: str) -> tuple[str, None]:
        """``name`` in a checkpoint, and None, as vLLM asks for it.

        Raises:
            BackendError: the checkpoint has no tensor of which that parameter is one alone.
        """
        for step in self._steps:
            name = step(name)
        return name, None

    def __bool__(self) -> bool:
        return bool(self._steps)


class WholeStacks:
    """Renames stacks of experts to the parameters that hold them, for a model of vLLM's whose own loop over the weights
    takes what it knows nothing else of for a parameter.
    """

    def rename_source_key(self, name: str) -> tuple[str, None]:
        """``name``, which a checkpoint has, as a parameter of vLLM's; and None, as vLLM asks for it."""
        return _STACK.sub(lambda found: f".experts.routed_experts.{_PARAMETERS[found[1]]}_weight", name), None


def _conversions(config: Any, *, stacks: bool) -> list[Any]:
    """What leads from a parameter's name to a checkpoint's, in the order in which transformers goes the other way."""
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    kinds = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
    if len(kinds) != 1 or kinds[0] is None or not isinstance(config, kinds[0].config_class):
        # Code of the model's own, which transformers renames nothing for.
        return []
    with torch.device("meta"):
        model = kinds[0](config)
    found: list[Any] = [_Within(old, new) for old, new in _STACKED] if stacks else []
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        if getattr(transform, "prefix_to_remove", None):
            # What names begin with in the checkpoint of a larger model, of which this may be a part (Gemma 3n's text):
            # vLLM has another class for that.
            continue
        if isinstance(transform, WeightRenaming):
            found.append(_Renaming(transform.reverse_transform()))
        else:
            found.append(
                _Stacking(list(transform._original_source_patterns), list(transform._original_target_patterns))
            )
    return found


class _Renaming:
    def __init__(self, reverse: Any) -> None:
        self._reverse = reverse

    def __call__(self, name: str) -> str:
        renamed: str = self._reverse.rename_source_key(name)[0]
        return renamed


class _Within:
    """What vLLM's own mapping of a model renames only where nothing follows it, as it does in our tensors' names."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def __call__(self, name: str) -> str:
        return name.replace(self._old, self._new)


class _Stacking:
    """Experts that a checkpoint has one by one: their stack is named as vLLM names one."""

    def __init__(self, sources: list[str], targets: list[str]) -> None:
        self._sources, self._targets = sources, targets
        self._stack: str | None = None
        if len(targets) == 1 and all(".*." in source for source in sources):
            heads = {source.partition("*.")[0] for source in sources}
            leaves = tuple(source.partition("*.")[2].removesuffix(".weight") for source in sources)
            last = leaves[0] if len(leaves) == 1 else _GATES.get(leaves)
            if len(heads) == 1 and last is not None:
                self._stack = heads.pop() + last

    def __call__(self, name: str) -> str:
        target = next((target for target in self._targets if target in name), None)
        if target is None:
            return name
        if self._stack is None:
            raise BackendError(
                f"{name} in vLLM",
                found=f"checkpoints of this family make it of {', '.join(self._sources)}, which vLLM fuses otherwise",
                do="Serve the folder with `sparsify serve`, or with --model-impl transformers",
            )
        return name.replace(target, self._stack, 1)
