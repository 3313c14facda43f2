"""What a verification found, weight by weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class WeightCheck:
    """One weight that a contraction reads.

    Attributes:
        axis: the axis summed over, of ``shape``. ``zeros``: their share. ``pattern``: the N:M that holds along it.
        equal: whether onnxruntime gives the checkpoint's values, bit for bit; None where there is nothing to compare.
        tensorrt: None where its sparse kernels may take it, else the condition that fails.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str
    operator: str
    axis: int
    zeros: float
    pattern: str | None
    equal: bool | None = None
    tensorrt: str | None = None


@dataclass(frozen=True)
class Behaviour:
    """Greatest differences between onnxruntime and torch: of the outputs, relative to their size, and of tokens.

    ``tokens`` is how many greedy ones were compared, of which ``agreeing`` are the same; 0 where nothing generates.
    ``rounding``: how far torch's own outputs are from those of float64, where that had to be asked.
    """

    difference: float
    tokens: int
    agreeing: int
    rounding: float = 0.0


@dataclass
class Verification:
    """The result: sound where ``problems`` is empty. ``unchecked`` says what could not be looked at, and why.

    ``compared``: weights that were compared bit for bit; ``files``: other files, and headers. ``packed``: weights of a
    graph are stored so; ``sparse``: and our operators multiply with them as they are.
    """

    file: Path
    weights: list[WeightCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    opset: int = 0
    compared: int = 0
    files: int = 0
    behaviour: Behaviour | None = None
    packed: bool = False
    sparse: bool = False

    @property
    def sound(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "file": str(self.file), "sound": self.sound}
