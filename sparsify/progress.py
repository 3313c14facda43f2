"""Progress for people: one line that is drawn anew on a terminal, plain lines elsewhere, or somebody's own bars."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Protocol, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sparsify.context import Observer, Progress, observed
from sparsify.errors import SpecError
from sparsify.host import peak_memory
from sparsify.words import format_bytes, plain


class Bar(Protocol):
    """What is asked of a progress bar; tqdm's has it."""

    def update(self, n: float, /) -> Any: ...

    def set_description(self, desc: str, /) -> Any: ...


# True: the command line's own line; a function that is told; a bar like tqdm's, or what makes one for each phase.
Shown = bool | Observer | Bar | Callable[..., Bar] | None

# Where nothing can be drawn anew, a phase is told of when it begins and then no oftener than this (seconds).
_EVERY = 10.0
# A phase must have run so long before anything is foretold of it or its speed is said.
_SETTLED = 2.0
# Names are shortened to no fewer characters than these; where there is no room for so many other things go first.
_NAME = 20

_log = logging.getLogger("sparsify")


class Clock:
    """What observers were told last, and how long it has been going on."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.started = self.phase_started = now()
        self.last = Progress("starting")

    def take(self, step: Progress) -> bool:
        """Whether ``step`` is of another phase than the one before, or of the same once more."""
        fresh = step.phase != self.last.phase or step.done < self.last.done
        if fresh:
            self.phase_started = self._now()
        self.last = step
        return fresh

    @property
    def in_phase(self) -> float:
        return self._now() - self.phase_started

    @property
    def elapsed(self) -> float:
        return self._now() - self.started

    def parts(self) -> list[str]:
        """The sentence in parts, the one that must be said first; the name is not in it."""
        step, share, seconds = self.last, self.last.share, self.in_phase
        clocks = f"{duration(self.elapsed)} elapsed"
        said = [f"{step.phase} {step.count}".rstrip()]
        if share and share < 1 and seconds >= _SETTLED:
            clocks += f", {duration(seconds * (1 - share) / share)} left"
        said.append(clocks)
        if share and step.tokens and seconds >= _SETTLED:
            said.append(f"{step.tokens * share / seconds:,.0f} tokens/s")
        return said


def duration(seconds: float) -> str:
    """``0:07``, ``12:34``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def fitted(parts: list[str], name: str, width: int) -> str:
    """One line of at most ``width`` columns: as many of the parts as leave room for the end of ``name``."""
    for count in range(len(parts), 0, -1):
        line = "  ".join(parts[:count])
        room = width - len(line) - 2
        if name and room >= min(len(name), _NAME):
            return f"{line}  {name if len(name) <= room else _end(name, room)}"
        if len(line) <= width and (count <= 2 or not name):
            return line
    return parts[0][:width]


def _end(name: str, room: int) -> str:
    """The end of ``name`` in so many columns, from a dot, slash or space on where one is near."""
    end = name[3 - room :]
    at = min((end.find(mark) for mark in "./ " if mark in end[: len(end) // 2]), default=-1)
    return f"...{end[at + 1 :]}"


class _Console(Console):
    """The standard error for progress alone: whoever no longer reads it does not end the work."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class ProgressLine:
    """An observer that shows people how far things are. A context manager; outside of it nothing is drawn.

    Args:
        quiet: show nothing.
        console: where; None: the standard error.
    """

    def __init__(
        self, *, quiet: bool = False, console: Console | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or _Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
        self._quiet, self._clock, self._told = quiet, Clock(now), -_EVERY
        self._live: Live | None = None
        self._stack = ExitStack()
        if not quiet and self._console.is_terminal:
            # What is written to a file in the meantime must not be drawn on the terminal instead.
            self._live = Live(
                console=self._console,
                transient=True,
                get_renderable=self._drawn,
                redirect_stdout=sys.stdout.isatty(),
            )

    def show(self, step: Progress) -> None:
        """Take what an observer is told."""
        before, seconds = self._clock.last, self._clock.in_phase
        fresh = self._clock.take(step)
        self._log(step, before, seconds, fresh)
        if self._live is not None or self._quiet:
            return
        now = self._clock.elapsed
        if fresh or now - self._told >= _EVERY:
            self._told = now
            first, *rest = self._clock.parts()
            said = ", ".join([*rest, *([f"{format_bytes(peak_memory())} peak"] if not fresh else []), *self._name()])
            try:
                self._console.print(Text(f"{first}: {said}"), soft_wrap=True)
            except OSError:  # nobody reads it any more, or the disk is full: the work goes on
                self._quiet = True

    def _name(self) -> list[str]:
        return [plain(self._clock.last.what)] if self._clock.last.what else []

    def _drawn(self) -> Text:
        parts = [*self._clock.parts(), f"{format_bytes(peak_memory())} peak"]
        return Text(
            fitted(parts, "".join(self._name()), max(20, self._console.width - 1)), no_wrap=True, overflow="crop"
        )

    @staticmethod
    def _log(step: Progress, before: Progress, seconds: float, fresh: bool) -> None:
        """The story of a run, for ``--log-level info``."""
        if fresh and before.phase != "starting":
            _log.info("%s took %.1f s", before.phase, seconds)
        if (site := step.site) is not None:
            error = "" if site.error is None else f", error {site.error:.4f}"
            _log.info("%s: %.2f%% kept%s, %.2f s", site.name, 100 * site.kept, error, site.seconds)

    def __enter__(self) -> ProgressLine:
        self._stack.enter_context(observed(self.show))
        if self._live is not None:
            self._stack.enter_context(self._live)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._clock.last.phase != "starting":
            _log.info("%s took %.1f s", self._clock.last.phase, self._clock.in_phase)
        self._stack.__exit__(kind, error, trace)


class Bars:
    """Shows phases on bars like tqdm's.

    Args:
        made: a bar, which is used for every phase in turn, or what makes one (tqdm itself): a new one for each phase.
    """

    def __init__(self, made: Any) -> None:
        self._make = made if callable(made) else None
        self._bar: Any = None if callable(made) else made
        self._phase, self._done = "", 0

    def show(self, step: Progress) -> None:
        """Take what an observer is told."""
        if step.phase != self._phase or int(step.done) < self._done:
            self._begin(step)
        self._bar.total = None if step.total is None else int(step.total)
        self._bar.set_description(f"{step.phase} {step.what}".rstrip())
        self._bar.update(int(step.done) - self._done)
        self._done = int(step.done)

    def _begin(self, step: Progress) -> None:
        total = None if step.total is None else int(step.total)
        if self._make is not None:
            self.close()
            self._bar = self._make(total=total, desc=step.phase)
        elif hasattr(self._bar, "reset"):
            self._bar.reset(total)
        self._phase, self._done = step.phase, 0

    def close(self) -> None:
        """Close the bar of the last phase, where it is ours."""
        if self._make is not None and self._bar is not None:
            self._bar.close()


@contextmanager
def shown(progress: Shown = False, observe: Observer | None = None) -> Iterator[None]:
    """Show people what happens inside; see :data:`Shown`.

    Args:
        observe: told as well; where nobody is named, whoever is told already goes on being told.

    Raises:
        SpecError: nothing that progress can be shown by.
    """
    with ExitStack() as stack:
        tellers = [] if observe is None else [observe]
        if progress is True:
            tellers.append(stack.enter_context(ProgressLine()).show)
        elif _is_bar(progress):
            bars = Bars(progress)
            stack.callback(bars.close)
            tellers.append(bars.show)
        elif callable(progress):
            tellers.append(cast(Observer, progress))
        elif progress not in (False, None):
            raise SpecError(
                f"progress {progress!r}",
                found="nothing that progress can be shown by",
                do="Give True, a function that takes a sparsify.Progress, or tqdm",
            )

        def everybody(step: Progress) -> None:
            for tell in tellers:
                tell(step)

        stack.enter_context(observed(everybody if tellers else None))
        yield


def _is_bar(progress: Any) -> bool:
    made = progress.func if isinstance(progress, partial) else progress
    return hasattr(made, "update") and hasattr(made, "set_description")
