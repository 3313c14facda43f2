"""What a user asks of a compile, as words that were understood: nothing is opened yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparsify.calibration.accumulators import GRADIENTS
from sparsify.compiler.backend import Backend, as_backend, check_passes
from sparsify.data.batches import Calibration
from sparsify.data.given import are_texts, named_or_given
from sparsify.data.sources import check_named, same_source
from sparsify.errors import SpecError
from sparsify.method.base import Pass, check_order
from sparsify.method.region_pass import RegionPass
from sparsify.method.spec import parse_pass, spec_text, split_pipeline
from sparsify.method.structural_pass import StructuralPass
from sparsify.prune.names import Named
from sparsify.words import Schedule, check_amount, check_schedule, check_windows, names_given, path_given, split_names

_OF_A_PASS = ("pass", "only", "ignore")

Data = str | Path | Iterable[Any] | Calibration | None

# Granularities after which a model has no longer the dense model's blocks, or their outputs.
_OTHERS = {"layer": "a model without some of its blocks", "channel": "a model of another residual width"}


@dataclass(frozen=True)
class Request:
    """The words of a compile.

    Attributes:
        structural, others: the passes in their order, structural ones first.
        data: a source's name, what was given in Python, or None for the default; samples, length: how much is drawn.
        out: the folder to write; None keeps the result in memory. template: the file of a chat template.
        teacher: the dense model that a pass fits to, where it is not the one that is pruned here.
        named_by_passes: what each pass names for itself, in the order of all passes.
        evaluate: the text that judges, a source's name or what was given in Python; None for none. eval_windows: its
            first so many windows only.
        recipe: these words and those of opening the model, for another run; None where some are in memory alone.
        date: when they were given, in UTC.
        journal: what is finished is kept until the output is there. resume: go on with what is kept. checkpoint_every:
            after so many blocks activations are kept too; None for never.
        processes: how many share the work.
    """

    structural: tuple[StructuralPass, ...]
    others: tuple[Pass, ...]
    backend: Backend
    schedule: Schedule = "layer"
    data: Data = None
    samples: int | None = None
    length: int | None = None
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    out: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    template: str | Path | None = None
    teacher: str | Path | nn.Module | None = None
    named_by_passes: tuple[Named, ...] = ()
    evaluate: Any = None
    eval_windows: int | None = None
    recipe: Mapping[str, Any] | None = None
    date: str = ""
    journal: bool = True
    resume: bool = False
    checkpoint_every: int | None = None
    processes: int = 1

    @property
    def passes(self) -> tuple[Pass, ...]:
        return (*self.structural, *self.others)

    @property
    def fitted(self) -> list[RegionPass]:
        """Those that fit a model to another one."""
        return [own for own in self.others if isinstance(own, RegionPass)]

    @property
    def needs_data(self) -> bool:
        """Whether any pass does; what a user gave is always taken, for the errors that it lets be measured."""
        return self.data is not None or any(own.needs_data for own in self.passes)

    @property
    def most_rows(self) -> int | None:
        """How many rows a batch may have: one where gradients are taken, which are those of single samples."""
        return most_rows(self.passes, self.processes)

    @property
    def lesson(self) -> int:
        """How many batches are what one process would have as one: of passes that train, several share a step."""
        return max(1, (most_rows(self.passes) or 1) // (self.most_rows or 1))

    @property
    def shares_data(self) -> bool:
        """Whether the text that judges is what calibrates, of which the last tenth is held out then."""
        return isinstance(self.data, str) and isinstance(self.evaluate, str) and same_source(self.data, self.evaluate)

    @property
    def named(self) -> str | None:
        """The source that data are drawn from, None being a default; see :attr:`is_named`."""
        return self.data if isinstance(self.data, str) else None

    @property
    def is_named(self) -> bool:
        """Whether data are drawn, and were not given in Python."""
        return self.data is None or isinstance(self.data, str)


def most_rows(passes: Iterable[Pass], processes: int = 1) -> int | None:
    """The most rows of a batch that all of ``passes`` take; None for any number.

    Args:
        processes: how many share each step of what is trained, for which there are to be batches enough.
    """
    passes = list(passes)
    if any(GRADIENTS & set(own.statistics) for own in passes):
        return 1
    most = min((own.batch for own in passes if isinstance(own, RegionPass)), default=None)
    if most is None:
        return None
    return max(rows for rows in range(1, max(1, most // processes) + 1) if most % rows == 0)


def nothing_to_do() -> SpecError:
    return SpecError("compiling without a pass", found="nothing to do", do="Give --pass, e.g. --pass wanda:2:4")


def parse(
    passes: str | Pass | Sequence[str | Pass | Mapping[str, Any]],
    to: str | Backend,
    schedule: str,
    data: Data,
    *,
    samples: int | None = None,
    length: int | None = None,
    only: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
    output: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    template: str | Path | None = None,
    teacher: str | Path | nn.Module | None = None,
    evaluate: Any = None,
    eval_windows: int | None = None,
    without_pass: bool = False,
    journal: bool = True,
    resume: bool = False,
    checkpoint_every: int | None = None,
) -> Request:
    """Understand the words, and refuse what can be refused before a model is opened.

    Args:
        without_pass: whether the model seems to be stored in another form than the output's, so that writing it is
            something to do; who opens it knows.

    Raises:
        SpecError: a pass, an option, a backend or a schedule that there is not, or that cannot go together; amounts of
            data that are none.
    """
    if isinstance(passes, str):
        passes = split_pipeline(passes)
    given = [passes] if isinstance(passes, Mapping) or not isinstance(passes, Iterable) else passes
    told = [as_pass(own) for own in given]
    parsed = [own for own, _ in told]
    for own in parsed:
        if not isinstance(own, Pass) or not hasattr(own, "name"):
            raise SpecError(f"pass {own!r}", found="no pass", do='Give a spec ("wanda:2:4") or a pass: Wanda(NM(2, 4))')
    check_order(parsed)
    _check_rounded_once(told)
    backend, chosen = as_backend(to), check_schedule(schedule)
    if not parsed and backend.needs_pass and not without_pass:
        raise nothing_to_do()
    check_passes(backend, parsed)
    rewriting = next((own for own in parsed if "graph" in own.changes), None)
    if rewriting is not None and output is not None:
        raise SpecError(
            f"{spec_text(rewriting)} with an output",
            found=f"--to {backend.name} writes the parameters of a model, and {rewriting.name} changes its graph",
            do="Leave the output out and take the result's model in Python; --to packed or cuda packs weights in files",
        )
    check_amount(samples, length)
    structural = tuple(own for own in parsed if isinstance(own, StructuralPass))
    request = Request(
        structural=structural,
        others=tuple(parsed[len(structural) :]),
        backend=backend,
        schedule=chosen,
        data=data if isinstance(data, Calibration) else named_or_given(data),
        samples=samples,
        length=length,
        only=names_given(only, "only"),
        ignore=names_given(ignore, "ignore"),
        out=None if output is None else path_given(output, "output"),
        overwrite=overwrite,
        dry_run=dry_run,
        template=template,
        teacher=teacher,
        named_by_passes=tuple(named for _, named in told),
        evaluate=named_or_given(evaluate),
        eval_windows=eval_windows,
        journal=journal,
        resume=resume,
        checkpoint_every=checkpoint_every,
    )
    _check_resume(request)
    _check_checkpoints(request)
    _check_teacher(request)
    _check_judging(request)
    judged = isinstance(request.evaluate, str)
    if template is not None and not (request.needs_data and request.is_named) and not judged:
        found = "batches given in Python" if request.needs_data else "no pass that calibrates"
        raise SpecError(f"--chat-template {template}", found=found, do="Leave it out, or name data of chat messages")
    check_named(request.data, request.evaluate)
    return request


def as_pass(given: str | Pass | Mapping[str, Any]) -> tuple[Any, Named]:
    """A pass of a request, and what it names for itself: a spec, a pass, or ``{"pass": …, "only": …, "ignore": …}``.

    Raises:
        SpecError: as :func:`parse`.
    """
    named = Named()
    if isinstance(given, Mapping):
        wrong = [str(key) for key in given if key not in _OF_A_PASS]
        if wrong or "pass" not in given:
            found = f"'{wrong[0]}', which is no word of it" if wrong else "no 'pass'"
            raise SpecError("a pass with names of its own", found=found, do=f"Its words are {', '.join(_OF_A_PASS)}")
        named = Named(*(tuple(split_names(as_words(given.get(key)))) for key in ("only", "ignore")))
        given = given["pass"]
    return (parse_pass(given) if isinstance(given, str) else given), named


def _check_rounded_once(told: Sequence[tuple[Any, Named]]) -> None:
    """Raises:
    SpecError: a pass that rounds what another has rounded, as far as no model is needed to see it.
    """
    rounding = [own for own, named in told if own.leaves == "rounding" and not named.only]
    if len(rounding) > 1:
        first, second = (spec_text(own) for own in rounding[:2])
        raise SpecError(
            f"{second} after {first}",
            found="the same weights, which lie on a grid already and would be moved off it",
            do="Give one of them, or each `only` of its own (in a recipe, or in Python)",
        )


def as_words(given: Any) -> list[str]:
    """One text, several, or none, as a list."""
    return [given] if isinstance(given, str) else list(given or ())


def _check_resume(request: Request) -> None:
    if not request.resume:
        return
    found = next(
        (
            why
            for why, holds in (
                ("no output, beside which anything would be kept", request.out is None),
                ("a dry run, which finishes nothing", request.dry_run),
                ("--no-journal, without which nothing is kept", not request.journal),
            )
            if holds
        ),
        None,
    )
    if found is not None:
        raise SpecError("--resume", found=found, do="Leave one of the two out, or begin without --resume")


def _check_checkpoints(request: Request) -> None:
    every = request.checkpoint_every
    if every is None:
        return
    found = None
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        found = "no number of blocks"
    elif request.out is None:
        found = "no output, beside which anything would be kept"
    elif not request.journal:
        found = "--no-journal, without which nothing is kept"
    if found is not None:
        raise SpecError(f"--checkpoint-every {every}", found=found, do="Give 1 or more and an output, or leave it out")


def _check_teacher(request: Request) -> None:
    fitted = next((at for at, own in enumerate(request.passes) if isinstance(own, RegionPass)), None)
    if fitted is None:
        if request.teacher is not None:
            raise SpecError(
                f"--teacher {request.teacher}", found="no pass that fits to one", do="Give --pass refine beside it"
            )
        return
    if gone := next((o for o in request.structural if o.granularity in _OTHERS), None):
        raise SpecError(
            f"{spec_text(request.passes[fitted])} after {spec_text(gone)}",
            found=f"{_OTHERS[gone.granularity]}, and blocks are fitted to the dense model's one by one",
            do="Take granularity=block, or leave it out and train with sparsify tune --teacher",
        )
    before = {own.kind for own in request.passes[:fitted]}
    if request.teacher is None and not before & {"structure", "weights"}:
        own = request.passes[fitted]
        raise SpecError(
            f"{spec_text(own)} without a pass that prunes before it",
            found="a model that is its own teacher",
            do="Give the dense model with --teacher, or prune first: --pass twin:2:4 --pass refine",
        )


def _check_judging(request: Request) -> None:
    if request.eval_windows is not None:
        asked = f"--eval-windows {request.eval_windows}"
        if request.evaluate is None:
            raise SpecError(asked, found="no text to evaluate on", do="Name one with --eval TEXT")
        check_windows(request.eval_windows, asked)
    if request.evaluate is None:
        return
    asked = f"--eval {request.evaluate}" if isinstance(request.evaluate, str) else "evaluate="
    if not request.passes:
        found = "no pass, so that there is nothing to compare"
        raise SpecError(asked, found=found, do="Give --pass, or run sparsify eval MODEL --data TEXT")
    if own := next((own for own in request.passes if "graph" in own.changes), None):
        found = f"a graph that {spec_text(own)} changes, which is not the model's parameters alone"
        raise SpecError(asked, found=found, do=f"Leave it out, or evaluate without {own.name}")
    if are_texts(request.evaluate) and are_texts(request.data) and set(request.evaluate) & set(request.data):
        found = "texts that calibrate as well"
        raise SpecError(asked, found=found, do="Keep some texts back for it: calibration=texts[4:], evaluate=texts[:4]")


def default_output(source_name: str, passes: Sequence[str], to: str = "hf") -> Path:
    """``NAME-PASS[-BACKEND]`` in the current folder: ``llama-wanda-2-4``, ``llama-onnx``."""
    backend = as_backend(to).name
    spec = "-".join([spec_text(parse_pass(p)) for p in passes] + ([backend] if backend != "hf" else [])) or "dense"
    safe = spec.replace("%", "pct")
    return Path(f"{source_name}-{''.join(c if c.isalnum() or c in '._' else '-' for c in safe)}")
