"""What an evaluation says: perplexity with the loss of every window, scores, and a model before and after passes."""

from __future__ import annotations

import hashlib
import html
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparsify.context import Context
from sparsify.errors import SpecError, near
from sparsify.frontend.source import Source
from sparsify.quality.perplexity import losses_on, of_losses
from sparsify.quality.scores import Difference, Score
from sparsify.quality.verdict import Paired
from sparsify.words import plain

# Scores that a line shows.
_SHOWN = 4


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Perplexity over ``windows`` windows of ``sequence_length`` tokens of ``data``, and scores.

    Attributes:
        perplexity: NaN, with no windows, where no text was asked for.
        losses: the mean loss of each window, in order. sha256: of the windows' token ids.
        scores: by every metric of every task, or of pictures. notes: what is to be known of them.
        manifest: the digest of the folder's ``sparsify.json``, by which ``sparsify report`` knows it; None of what has
            none, and where nothing was held against it.
    """

    perplexity: float
    windows: int
    sequence_length: int
    data: str
    seconds: float
    losses: tuple[float, ...] = field(default=(), repr=False)
    sha256: str = field(default="", repr=False)
    scores: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()
    manifest: str | None = None

    def __repr__(self) -> str:
        said = [f"perplexity {figure(self.perplexity)} on {self.size}"] if self.windows else []
        said += [f"{score.task} {score.metric} {score.said}" for score in self.scores[:_SHOWN]]
        more = [f"and {len(self.scores) - _SHOWN} more scores"] if len(self.scores) > _SHOWN else []
        return plain(f"<Evaluation: {', '.join([*said, *more])}>")

    def _repr_html_(self) -> str:
        """For notebooks: a table."""
        rows = [("perplexity", self.size, figure(self.perplexity), f"{self.windows} windows")] if self.windows else []
        rows += [(score.task, score.metric, score.said, f"{score.n}") for score in self.scores]
        cells = ["".join(f"<td>{html.escape(plain(cell))}</td>" for cell in row) for row in rows]
        head = "".join(f"<th>{name}</th>" for name in ("", "metric", "value", "n"))
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"

    def score(self, task: str, metric: str = "acc") -> Score:
        """The score of ``task`` by ``metric``.

        Raises:
            SpecError: there is none.
        """
        found = {score.key: score for score in self.scores}
        if (task, metric) not in found:
            known = [" ".join(key) for key in found]
            raise SpecError(f"score '{task} {metric}'", found="none of that name", do=near(f"{task} {metric}", known))
        return found[task, metric]

    def differences(self, other: Evaluation) -> list[Difference]:
        """Every score against that of ``other``, document by document, where both have the same documents."""
        if not isinstance(other, Evaluation):
            do = "Give what sparsify.evaluate gave of the other model"
            raise SpecError("comparing two evaluations", found=type(other).__name__, do=do)
        others = {score.key: score for score in other.scores}
        pairs = [score.against(others[score.key]) for score in self.scores if score.key in others]
        return [pair for pair in pairs if pair is not None]

    def against(self, other: Evaluation, base: str = Paired.base, do: str = "") -> Paired:
        """This model against that of ``other``, window by window.

        Args:
            base: what the perplexity of ``other`` is called in the verdict. do: what to do where this one is worse.

        Raises:
            SpecError: they were measured on different windows.
        """
        if not self.windows or not other.windows:
            found = "no perplexity of one of them" if self.windows or other.windows else "no perplexity of either"
            raise SpecError(
                "comparing two evaluations", found=found, do="Give data to both; scores are compared by .differences()"
            )
        if self.sha256 != other.sha256 or len(self.losses) != len(other.losses):
            raise SpecError(
                "comparing two evaluations",
                found=f"other windows: {self.size} and {other.size}, and not the same token ids",
                do="Evaluate both on the same data, windows and sequence length; models of other tokenizers have none",
            )
        return Paired.of(self.losses, other.losses, base, do)

    @property
    def size(self) -> str:
        """On what, in words."""
        return f"{self.windows} windows of {self.sequence_length} tokens of {self.data}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all but the single losses and documents; what was not measured is null."""
        said = {key: value for key, value in vars(self).items() if key not in ("losses", "scores", "notes")}
        if not self.windows:
            said |= dict.fromkeys(("perplexity", "windows", "sequence_length", "data", "sha256"))
        if self.scores:
            said |= {"scores": [score.as_dict() for score in self.scores], "notes": list(self.notes)}
        return said


@dataclass(frozen=True)
class Judged:
    """A model before its passes and after them, on the same windows.

    Attributes:
        dense, pruned: before and after. base: what the perplexity before is called. do: what to do where it is worse.
    """

    dense: Evaluation
    pruned: Evaluation
    base: str = "the dense perplexity"
    do: str = ""

    @property
    def paired(self) -> Paired:
        """After against before."""
        return self.pruned.against(self.dense, self.base, self.do)

    @property
    def ratio(self) -> float:
        """The perplexity after over that before."""
        return self.paired.ratio

    @property
    def standard_error(self) -> float | None:
        """Of the logarithm of the ratio; None where there is but one window."""
        return self.paired.standard_error

    @property
    def verdict(self) -> str:
        """One sentence."""
        return self.paired.verdict

    def as_dict(self) -> dict[str, Any]:
        """For JSON and ``sparsify.json``; what is no number is null there."""
        return {
            "data": self.dense.data,
            "windows": self.dense.windows,
            "sequence_length": self.dense.sequence_length,
            "sha256": self.dense.sha256,
            "dense": self.dense.perplexity,
            "pruned": number(self.pruned.perplexity),
            **paired_as_dict(self.paired),
        }

    def lines(self) -> list[str]:
        """For people: the figures, and the verdict."""
        before, after = figure(self.dense.perplexity), figure(self.pruned.perplexity)
        return [f"perplexity on {self.dense.size}: {before} before, {after} after", self.verdict]


def paired_as_dict(paired: Paired) -> dict[str, Any]:
    """Two models for JSON."""
    return {"ratio": number(paired.ratio), "standard_error": paired.standard_error, "verdict": paired.verdict}


def figure(value: float) -> str:
    """A perplexity in words."""
    return f"{value:.3f}" if math.isfinite(value) else "no number"


def of_scores(scores: Sequence[Score], seconds: float, notes: Sequence[str] = ()) -> Evaluation:
    """An evaluation without a perplexity."""
    return Evaluation(math.nan, 0, 0, "", seconds, scores=tuple(scores), notes=tuple(notes))


def number(value: float) -> float | None:
    """``value``, and nothing where JSON has no number for it."""
    return value if math.isfinite(value) else None


def measure(source: Source, windows: Tensor, label: str, context: Context, *, refuse: bool = True) -> Evaluation:
    """The model on ``windows`` [count, length] of token ids, which are from ``label``.

    Args:
        refuse: a perplexity that is no number; else it is infinity: a model that was pruned is judged, not refused.

    Raises:
        SpecError, CalibrationError, TraceError: as :func:`sparsify.quality.perplexity.perplexity`.
    """
    started = time.perf_counter()
    losses, dtype = losses_on(source, windows, context)
    value = of_losses(losses, source.name, dtype, refuse=refuse)
    seconds = time.perf_counter() - started
    count, length = windows.shape
    return Evaluation(value, count, length, label, seconds, tuple(losses.tolist()), digest_of(windows))


def digest_of(windows: Tensor) -> str:
    """The sha256 of the token ids of ``windows`` [count, length], by which figures of the same text are known."""
    return hashlib.sha256(windows.long().contiguous().numpy().tobytes()).hexdigest()
