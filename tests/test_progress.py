"""Progress as people see it: a line on a terminal, plain lines in a file, other people's bars; and the story."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from functools import partial
from typing import Any, ClassVar

import pytest
from rich.console import Console
from tqdm import tqdm

import sparsify
from sparsify.context import Progress, SiteResult, counted, observed, report
from sparsify.progress import Clock, ProgressLine, duration, fitted, shown

SITE = SiteResult("layers.0.q", "layers.*.q", "layers.0.q.weight", (8, 8), "2:4", 0.5, 0.1234, 0.25, 64, [])


class Time:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def lines(*steps: tuple[float, Progress], quiet: bool = False) -> list[str]:
    """What is said where nothing can be drawn anew, of steps at so many seconds."""
    now, console = Time(), Console(file=io.StringIO(), width=40)
    with ProgressLine(quiet=quiet, console=console, now=now) as line:
        for at, step in steps:
            now.at = at
            line.show(step)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_phase_is_told_of_once_and_then_every_ten_seconds() -> None:
    steps = [(float(second), Progress("sampling", second, 128, "self")) for second in range(32)]
    said = lines((0, Progress("loading", what="models/tiny")), *steps)
    assert said[0] == "loading: 0:00 elapsed, models/tiny"
    assert said[1] == "sampling 0/128: 0:00 elapsed, self"
    assert [line.partition(":")[0] for line in said[1:]] == [f"sampling {at}/128" for at in (0, 10, 20, 30)]
    assert said[-1].startswith("sampling 30/128: 0:30 elapsed, 1:38 left, ") and said[-1].endswith(" peak, self")


def test_a_phase_that_comes_again_is_told_of_again() -> None:
    passes = [(1.0, Progress("pruning", done, 2, unit="layer")) for done in (0, 1, 2, 0, 1)]
    assert [line.partition(":")[0] for line in lines(*passes)] == ["pruning layer 1/2"] * 2


def test_nothing_is_said_where_it_is_quiet_or_in_control_characters() -> None:
    assert lines((0, Progress("loading", what="x")), quiet=True) == []
    assert lines((0, Progress("loading", what="a\x1b[31mb\rc"))) == ["loading: 0:00 elapsed, a\\x1b[31mb\\rc"]


def test_nothing_is_foretold_before_it_can_be() -> None:
    """The first reading once was 21,846,734 tokens/s."""
    now = Time()
    clock = Clock(now)
    now.at = 60.0
    clock.take(Progress("pruning", 0.001, 32, unit="layer", tokens=262144))
    now.at = 60.01
    assert clock.parts() == ["pruning layer 1/32", "1:00 elapsed"]
    clock.take(Progress("pruning", 8, 32, unit="layer", tokens=262144))
    now.at = 160.0
    assert clock.parts() == ["pruning layer 9/32", "2:40 elapsed, 5:00 left", "655 tokens/s"]


@pytest.mark.parametrize("width", [40, 60, 79, 100, 160])
def test_a_line_fits_its_terminal_and_says_the_clocks_first(width: int) -> None:
    parts = ["pruning layer 9/32", "2:40 elapsed, 5:00 left", "655 tokens/s", "1.50 GiB peak"]
    line = fitted(parts, "model.layers.8.self_attn.q_proj", width)
    assert len(line) <= width
    assert ("elapsed, 5:00 left" in line) == (width > 40)
    assert width < 79 or "q_proj" in line
    assert width != 79 or line.endswith("  ...self_attn.q_proj")


def test_the_line_on_a_terminal_is_drawn_within_it_and_taken_away() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with ProgressLine(console=console) as line:
        report(Progress("pruning", 2.5, 32, "model.layers.2.self_attn.q_proj", "layer", 512))
        assert line._live is not None
        line._live.refresh()
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "pruning layer 3/32" in said and "elapsed" in said
    assert said.endswith("\x1b[2K") or "\x1b[2K" in said


def test_a_reader_that_is_gone_does_not_end_the_work() -> None:
    code = "\n".join(
        [
            "import sparsify.progress as p, sparsify.context as c",
            "with p.shown(True):",
            "    for phase in ('loading', 'tracing', 'pruning'): c.report(c.Progress(phase))",
            "print('done')",
        ]
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=write, text=True)
    os.close(write)
    assert done.returncode == 0 and done.stdout == "done\n"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 3599, 3661)] == ["0:00", "1:01", "59:59", "1:01:01"]


def test_the_count_names_what_is_under_way() -> None:
    assert Progress("sampling", 7, 128).count == "7/128"
    assert Progress("pruning", 2.25, 32, unit="layer").count == "layer 3/32"
    assert Progress("pruning", 32, 32, unit="layer").count == "layer 32/32"
    assert Progress("tracing").count == "" and Progress("tracing").share is None


def test_whoever_observes_is_told_and_inside_it_somebody_else() -> None:
    outer: list[Progress] = []
    inner: list[Progress] = []
    report(Progress("nobody"))
    with observed(outer.append):
        with observed(inner.append):
            assert list(counted("checking", ["a", "b"])) == ["a", "b"]
        with observed(None):
            report(Progress("loading"))
    assert [(step.count, step.what) for step in inner] == [("0/2", "a"), ("1/2", "b"), ("2/2", "")]
    assert [step.phase for step in outer] == ["loading"]


class Bar:
    """Of tqdm's kind, and remembers."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, total: float | None = None, desc: str = "") -> None:
        self.total, self.said, self.n, self.closed = total, [desc], 0.0, False
        Bar.made.append(self)

    def update(self, n: float) -> None:
        self.n += n

    def set_description(self, desc: str) -> None:
        self.said.append(desc)

    def close(self) -> None:
        self.closed = True


def steps() -> None:
    report(Progress("loading", what="m"))
    for done in range(5):
        report(Progress("sampling", done, 4, "self"))


def test_a_kind_of_bar_makes_one_for_each_phase() -> None:
    Bar.made = []
    with shown(Bar):
        steps()
    assert [(bar.total, bar.n, bar.closed) for bar in Bar.made] == [(None, 0, True), (4, 4, True)]
    assert Bar.made[1].said[-1] == "sampling self"


def test_one_bar_serves_every_phase_and_stays_open() -> None:
    bar = Bar()
    with shown(bar):
        steps()
    assert bar.n == 4 and bar.total == 4 and not bar.closed


@pytest.mark.parametrize("kind", [tqdm, partial(tqdm, ncols=60, leave=False)])
def test_tqdm_itself(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with shown(kind):
        steps()
    assert "sampling self" in capsys.readouterr().err


def test_a_function_is_told_and_so_is_an_observer() -> None:
    one: list[Progress] = []
    other: list[Progress] = []
    with shown(one.append, other.append):
        steps()
    assert one == other and len(one) == 6


def test_true_is_the_command_lines_own(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(True):
        steps()
    assert capsys.readouterr().err.startswith("loading: 0:00 elapsed, m\nsampling 0/4: ")


def test_what_cannot_show_progress_is_refused() -> None:
    with pytest.raises(sparsify.SparsifyError, match="progress 7: nothing that progress can be shown by"), shown(7):  # type: ignore[arg-type]
        pass


def test_the_story(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparsify")
    lines((0, Progress("loading")), (2, Progress("pruning", 1, 2, site=SITE)), (5, Progress("checking")), quiet=True)
    assert caplog.messages == [
        "loading took 2.0 s", "layers.0.q: 50.00% kept, error 0.1234, 0.25 s", "pruning took 3.0 s",
        "checking took 0.0 s",
    ]  # fmt: skip
