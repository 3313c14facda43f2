"""Several passes side by side: the same model, the same calibration tokens, the same held-out text."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.calibration.data import evaluation_windows, load_calibration
from sparsify.calibration.statistics import GRADIENTS
from sparsify.compiler import compile, parse_bytes, resolve_device
from sparsify.engine import Engine, Schedule
from sparsify.errors import SpecError
from sparsify.evaluate import perplexity
from sparsify.memory import recent_peak, reset_peak
from sparsify.pruning import Observer, SiteResult
from sparsify.source import Source, open_source
from sparsify.spec import parse_pass
from sparsify.staging import Staging, check_output


@dataclass
class Row:
    """One pass of a comparison.

    Attributes:
        perplexity: on the held-out text; None where none was given.
        errors: ‖X₀Wᵀ−XŴᵀ‖/‖X₀Wᵀ‖ of each site over the calibration tokens, in the order of the model: its output in
            the pruned model against that in the dense one, what earlier sites lost included. ``error``: their mean.
            ``kept``: fraction of the pruned sites' weights.
        seconds: tracing, calibration, pruning and writing. ``memory``: peak resident bytes meanwhile, None where
            the system does not say.
    """

    name: str
    perplexity: float | None
    error: float | None
    kept: float
    seconds: float
    memory: int | None
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """The result of :func:`compare`: the dense model first, then one row per pass."""

    model: str
    calibration: str
    data: str | None
    schedule: str
    rows: list[Row]
    output: Path | None = None

    def markdown(self) -> str:
        """The table, as text for a report."""
        lines = ["| pass | perplexity | error | kept | seconds | peak memory, MiB |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            cells = [
                "" if value is None else format(value, form)
                for value, form in (
                    (row.perplexity, ".3f"), (row.error, ".4f"), (row.kept, ".2%"), (row.seconds, ".1f"),
                    (None if row.memory is None else row.memory / (1 << 20), ".0f"),
                )
            ]  # fmt: skip
            lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "output"}


def compare(
    model: str | Path,
    passes: Sequence[str],
    *,
    data: str | None = None,
    calibration: Any = None,
    windows: int | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    schedule: Schedule = "layer",
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    memory: int | str = "8GiB",
    allow_bin: bool = False,
    trust_remote_code: bool = False,
    observe: Observer = lambda progress: None,
) -> Comparison:
    """Prune ``model`` by each of ``passes`` on the same calibration tokens, and evaluate each on ``data``.

    Args:
        data: held-out text for perplexity, as for :func:`sparsify.evaluate.evaluate`; None for none.
        windows: evaluate on the first so many windows only.
        output: folder for ``compare.json``, ``compare.md``, ``compare.png`` and ``compare.svg``; None writes nothing.
        others: as for :func:`sparsify.compile`.

    Raises:
        SparsifyError: as :func:`sparsify.compile` and :func:`sparsify.evaluate.evaluate`; nothing is written then.
    """
    parsed = [parse_pass(spec) for spec in passes]
    if not parsed:
        raise SpecError("comparing without a pass", found="nothing to do", do="Give --passes wanda:2:4,sparsegpt:2:4")
    if output is not None:
        check_output(Path(output), overwrite=overwrite, source=Path(model) if Path(model).exists() else None)
    place, budget = resolve_device(device), parse_bytes(memory)
    source = open_source(model, allow_bin=allow_bin, trust_remote_code=trust_remote_code)
    text: tuple[Tensor, str] | None = None
    if data is not None:
        text = evaluation_windows(data, source, sequence_length, windows)
    shared = load_calibration(
        calibration, source, samples=samples, sequence_length=sequence_length, seed=seed,
        one_by_one=any(GRADIENTS & set(p.statistics) for p in parsed),
    )  # fmt: skip

    def quality(pruned: Source) -> float | None:
        return None if text is None else perplexity(pruned, text[0], device=place, memory=budget)

    rows = [Row("dense", quality(source), None, 1.0, 0.0, None)]
    for spec in passes:
        reset = reset_peak(place)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="sparsify-compare-") as folder:
            made = compile(
                model, [spec], calibration=shared, schedule=schedule, output=Path(folder) / "pruned", device=device,
                memory=memory, allow_bin=allow_bin, trust_remote_code=trust_remote_code, observe=observe,
            )  # fmt: skip
            seconds, peak = time.perf_counter() - started, recent_peak(place) if reset else None
            run = made.runs[0]
            sites: list[SiteResult] = run.sites
            errors = Engine(
                made.program, {t.parameter: run.weight_pass for t in run.targets}, run.targets,
                shared.batches, dense=source.weights, memory=budget, device=place,
            ).drift()  # fmt: skip
            rows.append(
                Row(
                    name=spec,
                    perplexity=quality(Source(source.name, source.module, made.program.weights)),
                    error=sum(errors.values()) / len(errors) if errors else None,
                    kept=run.kept,
                    seconds=seconds,
                    memory=peak,
                    errors=errors,
                    notes=[f"{site.name}: {note}" for site in sites for note in site.notes],
                )
            )
    result = Comparison(
        source.name, f"{shared.size}: {shared.label}",
        None if text is None else f"{len(text[0])} windows of {text[0].shape[1]} tokens of {text[1]}", schedule, rows,
    )  # fmt: skip
    if output is not None:
        with Staging(Path(output), overwrite=overwrite) as staging:
            write(result, staging.folder)
            result.output = staging.commit()
    return result


def write(comparison: Comparison, folder: Path) -> None:
    """``compare.json``, ``compare.md``, ``compare.png`` and ``compare.svg`` in ``folder``."""
    from sparsify.figure import draw

    (folder / "compare.json").write_text(json.dumps(comparison.as_dict(), indent=2) + "\n", encoding="utf-8")
    heading = f"# {comparison.model}\n\ncalibration: {comparison.calibration}\n"
    if comparison.data is not None:
        heading += f"\nperplexity: {comparison.data}\n"
    (folder / "compare.md").write_text(f"{heading}\n{comparison.markdown()}", encoding="utf-8")
    for name in ("compare.png", "compare.svg"):
        draw(comparison, folder / name)


def split_specs(text: str) -> list[str]:
    """``wanda:50%,group=layer,sparsegpt:50%`` as two specs: what holds a = without a : before it is an option."""
    specs: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        if specs and "=" in part and ":" not in part.partition("=")[0]:
            specs[-1] += f",{part}"
        elif part:
            specs.append(part)
    return specs
