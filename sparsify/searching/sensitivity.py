"""``sensitivity``: what each kind of layer costs in each block, by pruning that alone."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.compiler.pipeline import untold
from sparsify.context import Context, Observer
from sparsify.errors import CalibrationError, SpecError
from sparsify.files.reading import kind_at
from sparsify.files.staging import Staging
from sparsify.host import cpu_by_default, resolve_device
from sparsify.method.spec import spec_text
from sparsify.method.weight_pass import WeightPass
from sparsify.progress import Shown, shown
from sparsify.searching.costs import Cost, Measure, Saving, Sensitivity, worst
from sparsify.searching.heatmap import draw
from sparsify.searching.parts import Part, cells, ignoring, size_of
from sparsify.searching.settings import one_spec, pruning_pass
from sparsify.searching.workbench import Words, Workbench, is_light
from sparsify.words import check_amount, check_windows, names_given, one_of, parse_bytes, path_given

MEASURES: tuple[Measure, ...] = ("perplexity", "kl")
# From so many parts on the divergence is measured, which fewer windows tell: every token's whole prediction counts.
_MANY, _FEW_WINDOWS = 96, 16


@cpu_by_default()
def sensitivity(
    model: str | Path | nn.Module,
    method: str | WeightPass | Sequence[str | WeightPass],
    *,
    data: str | Path,
    measure: str | None = None,
    leave: float = 0.3,
    output: str | Path | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    windows: int | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
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
) -> Sensitivity:
    """What pruning by ``method`` costs, kind by kind and block by block; each is pruned alone, all else stays dense.

    Args:
        method: a spec with a pattern: ``"wanda:2:4"``, ``"twin:50%"``.
        data: the text that judges, as for :func:`sparsify.search`; so are all that are not named here.
        measure: ``"perplexity"`` or ``"kl"``, the divergence of the predictions from the dense model's; None: the
            first where there are fewer than 96 parts, else the second, on 16 windows.
        leave: which share of the whole loss ``saving`` takes away.
        output: the folder for ``sensitivity.json``, ``.md``, ``.png`` and ``.svg``, a heat map; None writes nothing.

    Raises:
        SpecError: a pass without a pattern, or one that does not prune weight by weight.
        SparsifyError: as :func:`sparsify.search`. Nothing is written then.
    """
    own = pruning_pass(one_spec(method), "sensitivity to")
    chosen = None if measure is None else one_of(measure, MEASURES, "measure")
    if not isinstance(leave, int | float) or not 0 < leave < 1:
        raise SpecError(f"leaving {leave} of the loss", found="not between 0 and 1", do="Give 0.3, say")
    check_amount(samples, sequence_length)
    check_windows(windows)
    opening: dict[str, Any] = {
        "allow_bin": allow_bin, "trust_remote_code": trust_remote_code, "check": check, "allow_nan": allow_nan,
        "compute_dtype": compute_dtype, "strict": strict, "adapter": adapter,
        "tokenizer": tokenizer,
    }  # fmt: skip
    words = Words(
        str(data), calibration, windows, samples, sequence_length,
        # Of what is pruned alone the input is dense in every schedule; in this one it is measured once.
        "dense" if is_light(own) else "layer",
        names_given(only, "only"), names_given(ignore, "ignore"), chat_template, opening,
    )  # fmt: skip
    context = Context(resolve_device(device), parse_bytes(memory), seed)
    started = time.perf_counter()
    with shown(progress, observe), ExitStack() as stack:
        staging = None
        if output is not None:
            local = Path(model) if not isinstance(model, nn.Module) and kind_at(model) else None
            staging = stack.enter_context(Staging(path_given(output, "output"), overwrite=overwrite, source=local))
        bench = stack.enter_context(Workbench(model, own, words, context))
        bench.draw()
        parts = cells(bench.targets)
        chosen = chosen or ("perplexity" if len(parts) < _MANY else "kl")
        if chosen == "kl" and windows is None:
            bench.judge_by(_FEW_WINDOWS)
        reading = time.perf_counter()
        dense = bench.judge.perplexity(bench.dense)
        reading = time.perf_counter() - reading
        if not math.isfinite(dense):
            raise CalibrationError(
                f"sensitivity of {bench.source.name}", found="a dense model whose perplexity is no number",
                do="Look at its weights",
            )  # fmt: skip
        tell(f"{len(parts)} parts alone, and two prunings of many; each is {bench.size(reading)}")
        costs = _costs(bench, parts, chosen, dense, tell)
        result = Sensitivity(
            model=bench.source.name,
            spec=spec_text(own),
            measure=chosen,
            costs=costs,
            saving=_saving(bench, parts, [cost.loss for cost in costs], leave, tell),
            dense=dense,
            data=bench.label,
            calibration=None if bench.calibration is None else f"{bench.calibration.size}: {bench.calibration.said}",
            weights=sum(map(size_of, bench.targets)),
            seconds=time.perf_counter() - started,
        )
        if staging is not None:
            _write(result, staging.folder)
            result = replace(result, output=staging.commit())
        return result


def _costs(
    bench: Workbench, parts: Sequence[Part], measure: Measure, dense: float, tell: Callable[[str], None]
) -> list[Cost]:
    """Each of ``parts`` pruned alone, and judged.

    Raises:
        CalibrationError: one that breaks the model.
    """
    if measure == "kl":
        bench.judge.keep(bench.dense)
    found = []
    for number, part in enumerate(parts, 1):
        weights, _ = bench.prune(bench.own, part.targets)
        perplexity = bench.judge.perplexity(weights) if measure == "perplexity" else None
        loss = bench.judge.divergence(weights) if perplexity is None else math.log(perplexity / dense)
        if not math.isfinite(loss):
            raise CalibrationError(
                f"pruning {part.name} alone", found="a model whose predictions are no numbers",
                do="Leave it out with --ignore",
            )  # fmt: skip
        found.append(
            Cost(part.kind, part.blocks[0], tuple(t.site.name for t in part.targets), part.size, loss, perplexity)
        )
        tell(f"{number} of {len(parts)}: {part.name}: {loss:.4g} nats a token")
    return found


def _saving(
    bench: Workbench, parts: Sequence[Part], losses: Sequence[float], leave: float, tell: Callable[[str], None]
) -> Saving:
    """What leaving the worst parts dense is worth, measured: all of them pruned together, then all but those."""
    chosen = set(worst([part.size for part in parts], losses, leave))
    if len(chosen) == len(parts):
        chosen.discard(min(chosen, key=lambda at: losses[at]))
    dense = [target for at, part in enumerate(parts) if at in chosen for target in part.targets]
    pruned = [target for at, part in enumerate(parts) if at not in chosen for target in part.targets]
    tell("all parts together, then all but the worst")
    before, after = (
        bench.judge.perplexity(bench.prune(bench.own, targets, "layer")[0]) for targets in (bench.targets, pruned)
    )
    whole = sum(max(0.0, loss) for loss in losses)
    share = sum(max(0.0, losses[at]) for at in chosen) / whole if whole else 0.0
    return Saving(tuple(ignoring(dense, pruned)), share, sum(map(size_of, dense)), before, after)


def _write(result: Sensitivity, folder: Path) -> None:
    text = json.dumps(result.as_dict(), indent=2) + "\n"
    (folder / "sensitivity.json").write_text(text, encoding="utf-8")
    heading = f"# {result.model}, {result.spec}\n\n{result.data}\n\n```sh\n{result.ignore_line}\n```\n\n"
    (folder / "sensitivity.md").write_text(heading + result.markdown(), encoding="utf-8")
    for name in ("sensitivity.png", "sensitivity.svg"):
        draw(result, folder / name)
