"""How a model is tuned, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from sparsify.errors import SpecError
from sparsify.words import check_amount, check_seed, one_of

Method = Literal["lora", "full"]
METHODS: tuple[Method, ...] = get_args(Method)


def check_method(text: str) -> Method:
    """``text`` as a method.

    Raises:
        SpecError: it is none.
    """
    return one_of(text, METHODS, "method")


@dataclass(frozen=True)
class Recipe:
    """How a model is tuned.

    Attributes:
        method: ``lora`` trains low-rank additions, ``full`` every parameter.
        rate: of AdamW at its highest; None: 3e-4 for LoRA, 2e-5 for all weights. warmup: steps until then.
        steps: of the optimizer; None: as many as ``epochs`` over the samples take. minutes: stop after so many.
        batch: sequences a step; micro: of them at once. samples, length: sequences drawn, and their tokens
            (None: 256, or the context of a model that has less).
        targets: what LoRA is put on, names between commas (:mod:`sparsify.tuning.targets`); None: every linear layer.
        distill: with a teacher, the share of its divergence in the loss, of cross-entropy the rest; None: half
            (docs/benchmarks.md, "Tuning with a teacher").
    """

    method: Method = "lora"
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    rate: float | None = None
    warmup: int = 100
    epochs: int = 2
    steps: int | None = None
    minutes: float | None = None
    batch: int = 64
    micro: int = 4
    samples: int = 2000
    length: int | None = None
    seed: int = 0
    targets: str | None = None
    distill: float | None = None

    def __post_init__(self) -> None:
        check_method(self.method)
        least = {"rank": 1, "alpha": 1, "epochs": 1, "batch": 1, "micro": 1, "samples": 1, "steps": 1, "warmup": 0}
        for name, value in asdict(self).items():
            if name in least and value is not None and value < least[name]:
                raise SpecError(f"{name} {value}", found=f"it must be at least {least[name]}", do="Give more")
            if name in ("minutes", "rate") and value is not None and not 0 < value < float("inf"):
                raise SpecError(f"{name} {value}", found="it must be positive", do="Give another number")
        check_amount(None, self.length)
        check_seed(self.seed)
        if not 0 <= self.dropout < 1:
            raise SpecError(
                f"dropout {self.dropout}", found="no share from 0 up to, not including, 1", do="Give 0.05, say"
            )
        if self.distill is not None and not 0 < self.distill <= 1:
            raise SpecError(f"distill {self.distill}", found="no share above 0, up to 1", do="Give 1, or 0.5, say")
        if self.targets is not None:
            self._check_targets(self.targets)
        if self.batch % self.micro:
            raise SpecError(
                f"batches of {self.batch}",
                found=f"no multiple of {self.micro} sequences at once",
                do="Give --batch a multiple of --micro",
            )

    def _check_targets(self, targets: str) -> None:
        if self.method != "lora":
            raise SpecError(
                f"--targets {targets} with --method {self.method}",
                found="targets are what LoRA is put on",
                do="Take --method lora, or leave --targets out",
            )
        if not all(self.target_names):
            raise SpecError(f"--targets '{targets}'", found="an empty name", do="Give names between commas: q,v")

    @property
    def target_names(self) -> tuple[str, ...]:
        return tuple(word.strip() for word in (self.targets or "").split(","))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what only some runs have is in theirs alone."""
        return {k: v for k, v in asdict(self).items() if v is not None or k not in ("targets", "distill")}

    def words(self) -> dict[str, Any]:
        """What is not as it is by default."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @property
    def highest_rate(self) -> float:
        return self.rate if self.rate is not None else {"lora": 3e-4, "full": 2e-5}[self.method]


@dataclass
class Tuned:
    """What came of it.

    Attributes:
        data: what was trained on. ``left_out``: sequences of it that stand in the validation text.
        perplexity: on held-out text, before and after (merged). ``losses``: of every step.
        layers: where targets were named, the layers that LoRA was put on, their numbers as ``*``.
        teacher: name, digest and perplexity (on the same held-out text) of the teacher, how many of its weights are
            pruned, and over how many tokens it predicts and is learnt, where these differ; None without one.
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
