"""``search``: the sparsest model whose perplexity is within a budget."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sparsify.compiler.backend import Backend, as_backend
from sparsify.compiler.pipeline import compile, untold
from sparsify.compiler.recipe import recipe_of
from sparsify.compiler.request import parse
from sparsify.compiler.result import Compiled
from sparsify.context import Context, Observer
from sparsify.errors import CalibrationError, SpecError, VerifyError
from sparsify.files.reading import kind_at
from sparsify.files.staging import check_output
from sparsify.host import cpu_by_default, is_out_of_memory, resolve_device
from sparsify.ir.weights import Weights
from sparsify.method.spec import has_pattern, parse_pass, spec_text
from sparsify.method.weight_pass import WeightPass
from sparsify.progress import Shown, shown
from sparsify.quality.evaluation import digest_of
from sparsify.searching.budget import Budget, parse_budget
from sparsify.searching.found import Found, words_of
from sparsify.searching.parts import cells, size_of
from sparsify.searching.recorded import Recorded
from sparsify.searching.settings import ByKind, ByPart, one_spec, pruning_pass
from sparsify.searching.strategy.rounds import MOST, by_parts, by_percentages, most_trials
from sparsify.searching.trials import Trial, Trials
from sparsify.searching.workbench import Words, Workbench, zeros_of
from sparsify.words import (
    Schedule,
    check_amount,
    check_schedule,
    check_windows,
    names_given,
    parse_bytes,
    path_given,
)

# A model that is written is the trial's to the bit; on a GPU sums may come in another order.
_SLACK = 1e-3


@cpu_by_default()
def search(
    model: str | Path | nn.Module,
    method: str | WeightPass | Sequence[str | WeightPass],
    *,
    budget: str,
    data: str | Path,
    output: str | Path | None = None,
    to: str = "hf",
    calibration: Any = None,
    tokenizer: Any = None,
    windows: int | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    schedule: Schedule = "layer",
    ignore: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    device: str = "auto",
    memory: int | str = "8GiB",
    overwrite: bool = False,
    allow_bin: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
    allow_nan: bool = False,
    compute_dtype: str | torch.dtype | None = None,
    chat_template: str | Path | None = None,
    strict: bool = False,
    adapter: str | None = None,
    progress: Shown = False,
    observe: Observer | None = None,
    tell: Callable[[str], None] = untold,
) -> Found:
    """The sparsest pruning of ``model`` by ``method`` whose perplexity on ``data`` is within ``budget``.

    Without a pattern (``"twin"``, ``"wanda,group=layer"``) percentages are searched, one for all kinds of layers first
    and then one for each kind. With one (``"wanda:2:4"``) each kind in each few blocks is pruned to it or stays dense.
    Kinds are sites that read one input. At most 8 trials are made with all kinds alike, and 8 more for each kind.

    Args:
        budget: ``"perplexity<=1.05"`` or ``"perplexity<=+5%"``, against the dense model's; ``"perplexity<=12.3abs"``.
        data: the text that judges, as for :func:`sparsify.evaluation.evaluate.evaluate`; its held-out part where it
            has parts, and the last tenth of a file that calibrates as well.
        output: the folder to write, whose ``sparsify.json`` has the search; trials are kept in ``OUTPUT.search``, and
            the same search goes on from those that are there. None keeps model and trials in memory.
        calibration: as for :func:`sparsify.compile`; None: the other part of ``data``.
        windows: judge by the first so many windows only.
        tell: told of every trial in words. All others are as for :func:`sparsify.compile`.

    Raises:
        SpecError: a budget, a pass or a name that cannot be meant.
        CalibrationError: no trial was within the budget; it says which came nearest.
        SparsifyError: as :func:`sparsify.compile`. No folder is written then; trials stay.
    """
    if not isinstance(data, str | Path):
        do = "Write the texts to a file, and name that"
        raise SpecError("data that judge", found=f"{type(data).__name__}, where a source is named", do=do)
    method = one_spec(method)
    wanted, own = parse_budget(budget), parse_method(method)
    check_amount(samples, sequence_length)
    check_windows(windows)
    opening: dict[str, Any] = {
        "allow_bin": allow_bin, "trust_remote_code": trust_remote_code, "check": check, "allow_nan": allow_nan,
        "compute_dtype": compute_dtype, "strict": strict, "adapter": adapter,
        "tokenizer": tokenizer,
    }  # fmt: skip
    words = Words(
        str(data), calibration, windows, samples, sequence_length, check_schedule(schedule), names_given(only, "only"),
        names_given(ignore, "ignore"), chat_template, opening,
    )  # fmt: skip
    backend, out = as_backend(to), None if output is None else path_given(output, "output")
    context = Context(resolve_device(device), parse_bytes(memory), seed)
    with shown(progress, observe), ExitStack() as stack:
        claim = None
        if out is not None:
            local = Path(model) if not isinstance(model, nn.Module) and kind_at(model) else None
            claim = check_output(out, overwrite=overwrite, source=local)
            if claim is not None:
                stack.enter_context(claim)
        bench = stack.enter_context(Workbench(model, own, words, context))
        # What the model writes itself takes longest; of all else it is seen at once whether it is there.
        late = calibration == "self"
        if not late:
            bench.draw()
        dense = _dense(bench, wanted, tell)
        if late:
            bench.draw()
        hunt = _Hunt(bench, wanted, dense, out, has_pattern(method), tell)
        best = hunt.run()
        if claim is not None:
            # The compile takes it over.
            claim.release()
        recipe = _recipe(model, words, best, backend, seed, calibrates=bench.calibration is not None)
        found = replace(hunt.found(best), recipe=recipe)

        def look(weights: Weights) -> dict[str, Any]:
            hunt.check(best, weights)
            return found.record()

        compiled: Compiled = compile(
            model,
            [parse_pass(best.spec)],
            calibration=bench.calibration,
            schedule=schedule,
            output=out,
            # It has of each instance what the protocol has of a class.
            to=cast(Backend, Recorded(backend, look, recipe)),
            seed=seed,
            ignore=(*ignore, *best.ignore),
            only=only,
            device=device,
            memory=memory,
            overwrite=overwrite,
            # What a search goes on with is its trials.
            journal=False,
            **opening,
        )
        if out is None:
            hunt.check(best, compiled.program.weights)
        return replace(found, compiled=compiled, output=compiled.output, seconds=hunt.seconds)


def _recipe(
    model: str | Path | nn.Module, words: Words, best: Trial, backend: Backend, seed: int, *, calibrates: bool
) -> dict[str, Any] | None:
    """Of a compile that prunes as ``best`` does. The text that judges stands in it too: of a file that calibrates as
    well, its end is held out again. A pass that needs no data is given none, for then all of the file judged.
    """
    drawn = words.data if words.calibration is None else words.calibration
    request = parse(
        [best.spec],
        backend,
        words.schedule,
        drawn if calibrates else None,
        samples=words.samples if calibrates else None,
        length=words.sequence_length,
        only=words.only,
        ignore=(*words.ignore, *best.ignore),
        template=words.chat_template,
        evaluate=words.data,
        eval_windows=words.windows,
    )
    # Code of others is trusted on the command line alone.
    opening = {key: value for key, value in words.opening.items() if key not in ("check", "trust_remote_code")}
    return recipe_of(model, request, seed=seed, no_check=not words.opening["check"], **opening)


def parse_method(text: str) -> WeightPass:
    """The pass that ``text`` spells, which may go without a pattern: then any percentage stands for it.

    Raises:
        SpecError: as :func:`parse_pass`, or a pass that does not prune weight by weight.
    """
    own = pruning_pass(text, "searching with", "50%")
    if own.kinds:
        raise SpecError(f"pass '{text}'", found="percentages by kind, which are searched", do="Leave kinds out")
    if own.allocation != "uniform":
        raise SpecError(
            f"pass '{text}'",
            found="an allocation, and the search shares the zeros out itself",
            do="Leave allocation out",
        )
    return own


def _dense(bench: Workbench, budget: Budget, tell: Callable[[str], None]) -> tuple[float, float]:
    """The dense model's perplexity, and how long the reading took.

    Raises:
        CalibrationError: it is no number, or over the budget already, so that nothing can be within.
    """
    started = time.perf_counter()
    dense = bench.judge.perplexity(bench.dense)
    tell(f"dense: perplexity {dense:.4g}; the budget allows {budget.limit(dense):.4g}")
    if not math.isfinite(dense):
        raise CalibrationError(f"{budget}", found="a dense model whose perplexity is no number", do="Look at it")
    if budget.limit(dense) < dense:
        raise CalibrationError(f"{budget}", found=f"the dense model itself has {dense:.6g}", do="Give a larger budget")
    return dense, time.perf_counter() - started


class _Hunt:
    """The trials of one search, and what came of them."""

    def __init__(
        self,
        bench: Workbench,
        budget: Budget,
        dense: tuple[float, float],
        out: Path | None,
        fixed: bool,
        tell: Callable[[str], None],
    ) -> None:
        self.bench, self.budget, self.tell, self.fixed = bench, budget, tell, fixed
        self.started = time.perf_counter()
        self.trials = Trials({**bench.question(), "pass": spec_text(bench.own), "pattern": fixed}, out)
        self.total = sum(map(size_of, bench.targets))
        self.way: ByKind | ByPart
        if fixed:
            self.way = ByPart(bench.own, cells(bench.targets, MOST))
            self.sizes = {part.name: part.size for part in self.way.parts}
        else:
            self.way = ByKind(bench.own, bench.targets)
            self.sizes = {kind: sum(map(size_of, own)) for kind, own in self.way.kinds.items()}
        self.made: list[Trial] = []
        self.dense, seconds = dense
        self.limit = budget.limit(self.dense)
        self.most = most_trials(len(self.sizes), fixed)
        known = f", {self.trials.resumed} of them known from before" if self.trials.resumed else ""
        tell(f"at most {self.most} trials{known}; each is {bench.size(seconds)}")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def run(self) -> Trial:
        """The best trial.

        Raises:
            CalibrationError: none was within the budget.
        """
        over = math.log(self.dense) - math.log(self.limit)
        if self.fixed:
            by_parts(self.excess, self.sizes, over)
        else:
            by_percentages(self.excess, self.sizes, over)
        within = [trial for trial in self.made if trial.perplexity <= self.limit and trial.sparsity > 0]
        if within:
            return max(within, key=lambda trial: (trial.sparsity, -trial.perplexity))
        near = min(self.made, key=lambda trial: trial.perplexity)
        if math.isinf(near.perplexity):
            raise CalibrationError(
                f"{self.budget} by {self.bench.own.name}",
                found=f"none of {len(self.made)} trials gave a model that predicts anything"
                + (f": {near.refused}" if near.refused else ""),
                do="Look at the data and at the model's weights",
            )
        # To be pasted: a glob is quoted.
        words = shlex.join(words_of(near))
        raise CalibrationError(
            f"{self.budget} by {self.bench.own.name}",
            found=f"none of {len(self.made)} trials met it: nearest came {words} with "
            f"{near.perplexity:.6g} ({near.perplexity / self.dense:.4f} times the dense model's {self.dense:.6g}) at "
            f"{near.sparsity:.2%} zeros",
            do="Give a larger budget, or another pass",
        )

    def excess(self, levels: Mapping[str, int], words: str) -> float:
        """By how much the logarithm of the perplexity is above the budget's; see :mod:`.strategy`."""
        shares = self.way.shares(levels)
        trial = self.trials.find(shares)
        known = trial is not None
        if trial is None:
            trial = self._try(levels, words, shares)
            self.trials.keep(trial)
        if trial not in self.made:
            self.made.append(trial)
            within = "within the budget" if trial.perplexity <= self.limit else "over the budget"
            self.tell(
                f"{len(self.made)}: {words}: {trial.sparsity:.2%} zeros, perplexity {trial.perplexity:.4g}, "
                f"{trial.refused or within}{' (kept from before)' if known else f', {trial.seconds:.1f} s'}"
            )
        return math.log(trial.perplexity) - math.log(self.limit)

    def _try(self, levels: Mapping[str, int], words: str, shares: Mapping[str, float]) -> Trial:
        started, setting = time.perf_counter(), self.way.setting(levels)
        perplexity, refused = math.inf, ""
        try:
            weights, results = self.bench.prune(setting.own, setting.targets)
        except CalibrationError as error:
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise
            # So sparse that nothing reaches a layer any more, say: as bad as can be, and no reason to stop.
            refused = str(error)
            sparsity = sum(shares[name] * size for name, size in self.sizes.items()) / self.total
        else:
            perplexity, sparsity = self.bench.judge.perplexity(weights), zeros_of(results) / self.total
        return Trial(
            number=len(self.trials) + 1,
            words=words,
            shares=shares,
            spec=setting.spec,
            ignore=setting.ignore,
            perplexity=perplexity,
            sparsity=sparsity,
            seconds=round(time.perf_counter() - started, 3),
            refused=refused,
        )

    def check(self, best: Trial, weights: Weights) -> float:
        """The perplexity of the model as it is about to be written.

        Raises:
            VerifyError: it is not within the budget.
        """
        now = self.bench.judge.perplexity(weights)
        if now > self.limit * (1 + _SLACK):
            raise VerifyError(
                f"the model of trial {best.number}",
                found=f"a perplexity of {now:.6g}, where the trial had {best.perplexity:.6g}",
                do="Were its trials made on another machine? Remove OUT.search and search again; else report this",
            )
        return now

    def found(self, best: Trial) -> Found:
        """What the search gives back, but for the model."""
        bench = self.bench
        return Found(
            model=bench.source.name,
            budget=str(self.budget),
            dense=self.dense,
            limit=self.limit,
            best=best,
            perplexity=best.perplexity,
            trials=self.made,
            weights=self.total,
            data=bench.label,
            sha256=digest_of(bench.judge.windows),
            calibration=None if bench.calibration is None else f"{bench.calibration.size}: {bench.calibration.said}",
            schedule=bench.words.schedule if bench.calibration is not None else "none",
            seconds=self.seconds,
            resumed=self.trials.resumed,
            kept=self.trials.path,
        )
