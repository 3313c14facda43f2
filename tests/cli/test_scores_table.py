"""The table of scores that ``sparsify eval --tasks`` prints: figures whole, names short, no false sentence."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sparsify.cli.evaluating.tables import score_report
from sparsify.quality.evaluation import Evaluation, of_scores
from sparsify.quality.scores import Score
from sparsify.words import apart


def judged(samples: tuple[float, ...], sha256: str = "1") -> Evaluation:
    accuracy = Score("my_quiz", "acc_norm", 1.0, 0.0, len(samples), share=True, samples=samples, sha256=sha256)
    reading = Score("my_texts", "word_perplexity", 70.79, 21.0, 3, higher_is_better=False, sha256=sha256)
    return of_scores([accuracy, reading] if samples else [reading], 1.0)


def printed(results: list[tuple[str, Evaluation]], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(*score_report(results))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("width", [80, 120])
def test_figures_stay_on_one_line(count: int, width: int) -> None:
    places = [f"/a/very/long/way/to/where/models/lie/{name}" for name in ("stories260k", "out", "packed")][:count]
    said = printed([(place, judged((1.0,) * 24)) for place in places], width)
    assert said.count("100.00% ± 0.00") == count and said.count("70.79 ± 21") == count
    assert count == 1 or said.count("+0.00 ± 0.00") == count - 1
    assert max(map(len, said.splitlines())) <= width


def test_all_columns_are_there_in_a_narrow_terminal() -> None:
    said = printed([("a", judged((1.0,) * 24)), ("b", judged((1.0,) * 24))], 40)
    head = next(line for line in said.splitlines() if line.startswith("┏"))
    assert len(columns := head.strip("┏┓").split("┳")) == 6 and all(len(column) > 3 for column in columns)
    assert max(map(len, said.splitlines())) <= 40


def test_long_names_are_told_apart_by_their_ends() -> None:
    assert apart(["OUT", "models/pycode-6m"]) == ["OUT", "models/pycode-6m"]
    assert apart(["/work/shared/models/stories260k", "hf"]) == ["stories260k", "hf"]
    assert apart(["/one/long/way/to/run-1/out", "/one/long/way/to/run-2/out/"]) == ["run-1/out", "run-2/out"]
    assert apart(["/one/long/way/to/run-1/out"] * 2) == ["out", "out"]


def test_pictures_are_called_so() -> None:
    score = Score("IMAGES", "top-1", 0.5, 0.5, 2, share=True, unit="picture", samples=(0.0, 1.0))
    said = printed([(name, of_scores([score], 1.0)) for name in ("a", "b")], 100)
    assert "on the same pictures." in " ".join(said.split())


def test_why_there_are_no_pairs() -> None:
    same = printed([("a", judged(())), ("b", judged(()))], 100)
    assert "b: scores that are no means over documents, so that no pairs" in same and "other documents" not in same
    other = printed([("a", judged((1.0, 0.0))), ("b", judged((1.0, 1.0), "2"))], 100)
    assert "b: other documents than the first's, so that no pairs" in other
