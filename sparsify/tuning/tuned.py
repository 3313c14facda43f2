"""What came of a tuning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsify.tuning.recipe import Recipe


@dataclass
class Tuned:
    """What came of it.

    Attributes:
        data: what was trained on. ``left_out``: sequences of it that stand in the validation text.
        perplexity: on held-out text, before and after (merged). ``losses``: of every step.
        layers: where targets were named, the layers that LoRA was put on, their numbers as ``*``.
        teacher: name, digest and perplexity (on the same held-out text) of the teacher, and how many of its weights
            are pruned; None without one.
    """

    recipe: Recipe
    output: Path
    steps: int
    tokens: int
    seconds: float
    perplexity: tuple[float, float]
    validation: str
    masked: int
    data: str
    losses: list[float] = field(default_factory=list)
    left_out: int = 0
    layers: Sequence[str] = ()
    teacher: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what this run had nothing of is not in it."""
        said = asdict(self) | {"output": str(self.output), "recipe": self.recipe.as_dict()}
        return {k: v for k, v in said.items() if v or k not in ("left_out", "layers", "teacher")}
