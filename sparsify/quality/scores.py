"""Scores of tasks and of pictures: a value with its standard error, and two models on the same documents.

Of each document the values of both models are subtracted. The spread of these differences says how far other documents
would have moved their mean: less than each score moves, for what is hard is hard for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# Points of a hundred that a model lost, from which it is called so; docs/evaluation.md has the table.
SAME, SLIGHTLY, CLEARLY, MUCH = 0.5, 2.0, 5.0, 15.0
# A difference within so many standard errors is said to be none.
SURE = 2.0
# The metrics that a task is judged by, the first that it has.
JUDGED = ("acc", "top-1", "exact_match", "acc_norm")
# So many scores have a sentence each; of more those of several tasks have, where there are any.
_SENTENCES = 7
# Of fewer documents the spread itself is hardly known.
FEW = 30

Level = Literal["none", "better", "practically the same", "slightly", "clearly", "much", "far"]


@dataclass(frozen=True)
class Score:
    """One model by one metric of one task.

    Attributes:
        task: its name, that of a group or of a mean, or what pictures lie in. metric: with the filter of the answers
            behind it where there is one. value: as the library gives it; a share is from 0 to 1.
        standard_error: None where there is none. n: documents or pictures (``unit`` is one of them).
        higher_is_better: which way is good. share: whether the value is a mean of numbers from 0 to 1.
        chance: what guessing gives; None where nobody can say. shots: examples before each question.
        tasks: of how many it is. samples: of each document its value, where ``value`` is their mean; else nothing.
        sha256: of the documents. parts: the scores that this is the mean of, each counted once.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    n: int
    higher_is_better: bool = True
    share: bool = False
    chance: float | None = None
    shots: int | None = None
    tasks: int = 1
    unit: str = "document"
    samples: tuple[float, ...] = field(default=(), repr=False)
    sha256: str = field(default="", repr=False)
    parts: tuple[Score, ...] = field(default=(), repr=False)

    @property
    def said(self) -> str:
        """Value and standard error, in percent where it is a share."""
        if self.share:
            error = "" if self.standard_error is None else f" ± {100 * self.standard_error:.2f}"
            return f"{100 * self.value:.2f}%{error}"
        return f"{self.value:.4g}" + ("" if self.standard_error is None else f" ± {self.standard_error:.2g}")

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the other scores of the same model."""
        return self.task, self.metric

    def against(self, other: Score) -> Difference | None:
        """This model against that of ``other``, document by document; None where they were not the same documents, or
        where the score is no mean over documents.
        """
        if self.key != other.key:
            return None
        if self.parts:
            return self._of_parts(other)
        if not self.samples or self.sha256 != other.sha256 or len(self.samples) != len(other.samples):
            return None
        pairs = [one - before for one, before in zip(self.samples, other.samples, strict=True)]
        mean, error = mean_and_error(pairs)
        return Difference(self, other, mean, error, sum(pair != 0 for pair in pairs))

    def _of_parts(self, other: Score) -> Difference | None:
        found = [one.against(before) for one, before in zip(self.parts, other.parts, strict=False)]
        if len(self.parts) != len(other.parts):
            return None
        known = [one for one in found if one is not None]
        errors = [one.standard_error for one in known if one.standard_error is not None]
        if len(known) < len(found):
            return None
        error = math.sqrt(math.fsum(e**2 for e in errors)) / len(found) if len(errors) == len(found) else None
        mean = math.fsum(one.value for one in known) / len(found)
        return Difference(self, other, mean, error, sum(one.changed for one in known))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all but the single documents."""
        said = {key: value for key, value in vars(self).items() if key not in ("samples", "parts")}
        # JSON has no number for what is none.
        said["value"] = self.value if math.isfinite(self.value) else None
        return said | ({"mean_of": [part.task for part in self.parts]} if self.parts else {})


@dataclass(frozen=True)
class Difference:
    """One model against another on the same documents.

    Attributes:
        value: mean difference of what they scored. standard_error: of that mean; None of one document.
        changed: documents that they scored differently.
    """

    score: Score
    other: Score
    value: float
    standard_error: float | None
    changed: int

    @property
    def said(self) -> str:
        """The difference with its standard error."""
        factor, form = (100, ".2f") if self.score.share else (1, ".3g")
        error = "" if self.standard_error is None else f" ± {format(factor * self.standard_error, form)}"
        return f"{format(factor * self.value, '+' + form)}{error}".replace("-", "−")

    @property
    def level(self) -> Level | None:
        """What the difference is called; None of what is no share of right answers."""
        if not self.score.share:
            return None
        gain = 100 * self.value * (1 if self.score.higher_is_better else -1)
        if self.standard_error is not None and abs(self.value) <= SURE * self.standard_error:
            return "none"
        if not self.changed:
            return "none"
        if gain > 0:
            return "better"
        names: tuple[tuple[float, Level], ...] = (
            (SAME, "practically the same"),
            (SLIGHTLY, "slightly"),
            (CLEARLY, "clearly"),
            (MUCH, "much"),
        )
        return next((name for limit, name in names if -gain < limit), "far")

    @property
    def verdict(self) -> str | None:
        """One sentence: the difference, what it is called, and whether anything but guessing was seen."""
        level, n, error = self.level, self.score.n, self.standard_error
        if level is None:
            return None
        if guesses(self.other) and not self.score.parts:
            chance = f"{100 * (self.other.chance or 0):.1f}%"
            return f"neither can be told from guessing ({chance})" if guesses(self.score) else (
                f"the first cannot be told from guessing ({chance}), so that this says little"
            )  # fmt: skip
        points = f"{abs(100 * self.value):.2f} points"
        if level == "none":
            said = f"no difference that {self._counted} can show"
            if not self.changed:
                return f"the same on each of {self._counted}"
            most = 100 * (abs(self.value) + SURE * (error or 0))
            if most > SLIGHTLY:
                said += f"; {most:.1f} points would look the same, so take more"
            return said
        said = f"{points} better" if level == "better" else f"{points} lost: {level}"
        said += " worse" if level in ("slightly", "clearly", "much", "far") else ""
        if n < FEW:
            said += f", as far as {self._counted} can tell"
        if guesses(self.score) and not self.score.parts:
            said += f"; it cannot be told from guessing ({100 * (self.score.chance or 0):.1f}%)"
        return said

    @property
    def _counted(self) -> str:
        n, unit = self.score.n, self.score.unit
        return f"one {unit}" if n == 1 else f"{n} {unit}s"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "task": self.score.task,
            "metric": self.score.metric,
            "difference": self.value,
            "standard_error": self.standard_error,
            "changed": self.changed,
            "verdict": self.verdict,
        }


def told(pairs: Sequence[Difference]) -> list[Difference]:
    """Those of ``pairs`` that are told in a sentence: each task by the metric that it is judged by; of many tasks the
    sets and groups alone.
    """
    chosen: dict[str, Difference] = {}
    for metric in JUDGED:
        for pair in pairs:
            if pair.verdict is not None and pair.score.metric.partition(" ")[0] == metric:
                chosen.setdefault(pair.score.task, pair)
    found = [pair for pair in pairs if chosen.get(pair.score.task) is pair]
    return [pair for pair in found if pair.score.tasks > 1] or found if len(found) > _SENTENCES else found


def guesses(score: Score) -> bool:
    """Whether ``score`` may come from guessing."""
    if score.chance is None or not score.higher_is_better:
        return False
    return score.value - SURE * (score.standard_error or 0) <= score.chance


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error: the values taken as independent; None of one."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def mean_of(name: str, scores: Sequence[Score]) -> Score:
    """The plain mean of ``scores``, each counted once, however many documents it has: as papers print it."""
    errors = [score.standard_error for score in scores if score.standard_error is not None]
    whole = len(errors) == len(scores)
    return Score(
        task=name,
        metric=scores[0].metric,
        value=math.fsum(score.value for score in scores) / len(scores),
        standard_error=math.sqrt(math.fsum(error**2 for error in errors)) / len(scores) if whole else None,
        n=sum(score.n for score in scores),
        higher_is_better=scores[0].higher_is_better,
        share=all(score.share for score in scores),
        tasks=len(scores),
        parts=tuple(scores),
    )
