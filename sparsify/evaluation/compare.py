"""Several passes side by side: the same model, the same calibration tokens, the same held-out text."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.calibration.measuring import drift
from sparsify.compiler.keeping.dividing import agree_on_model, check_world
from sparsify.compiler.keeping.job import model_of, settings_of
from sparsify.compiler.pipeline import compile
from sparsify.compiler.request import most_rows
from sparsify.context import Context, Observer, SiteResult
from sparsify.data.batches import Calibration, evaluation_windows, load_calibration
from sparsify.data.chat import Chat
from sparsify.data.given import named_or_given
from sparsify.data.sources import check_named, same_source
from sparsify.errors import SpecError
from sparsify.evaluation.comparison import Compared, ComparedPass
from sparsify.evaluation.figure import draw
from sparsify.files.ownership import Scratch
from sparsify.files.reading import kind_at
from sparsify.files.staging import Staging
from sparsify.frontend.source import Source, open_source
from sparsify.host import cpu_by_default, recent_peak, reset_peak, resolve_device
from sparsify.journal.journal import NOT_KEPT, Journal, Kept, look
from sparsify.journal.shared import shared
from sparsify.method.spec import parse_pass, split_pipeline
from sparsify.progress import Shown, shown
from sparsify.quality.perplexity import perplexity
from sparsify.tensors import digest
from sparsify.words import Schedule, parse_bytes
from sparsify.world.world import ALONE, World


@cpu_by_default()
def compare(
    model: str | Path,
    passes: Sequence[str],
    *,
    data: str | Path | None = None,
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
    check: bool = True,
    allow_nan: bool = False,
    compute_dtype: str | torch.dtype | None = None,
    chat_template: str | Path | None = None,
    strict: bool = False,
    adapter: str | None = None,
    resume: bool = False,
    world: World = ALONE,
    progress: Shown = False,
    observe: Observer | None = None,
) -> Compared:
    """Prune ``model`` by each of ``passes`` on the same calibration tokens, and evaluate each on ``data``.

    Args:
        passes: specs, or several with ``+`` between, which run one after the other (``twin:2:4+refine``).
        data: held-out text for perplexity, as for :func:`sparsify.evaluate`; None for none.
            Of a file that is ``calibration`` as well the last tenth is held out.
        windows: evaluate on the first so many windows only.
        progress, observe: as for :func:`sparsify.compile`.
        output: folder for ``compare.json``, ``compare.md``, ``compare.png`` and ``compare.svg``; None writes nothing.
        resume: go on where the same comparison was interrupted: passes that were finished are not run again.
        world: processes among which the passes are dealt out, all of which call this alike (:func:`sparsify.join`):
            each runs some of them whole, so that the table is that of one process; the first writes.
        others: as for :func:`sparsify.compile`.

    Raises:
        SparsifyError: as :func:`sparsify.compile` and
            :func:`sparsify.evaluate`; nothing is written then. ProcessError: fewer passes than processes, or one that
            was asked otherwise or failed.
    """
    pipelines = [split_pipeline(spec) for spec in passes]
    parsed = [parse_pass(spec) for pipeline in pipelines for spec in pipeline]
    if not parsed:
        raise SpecError("comparing without a pass", found="nothing to do", do="Give --passes wanda:2:4,sparsegpt:2:4")
    if other := next((own for own in parsed if own.kind not in ("channels", "weights", "regions", "rounding")), None):
        raise SpecError(
            f"comparing {other.name}",
            found="a pass that neither prunes nor trains weight by weight, so that no site's error can be told",
            do="Compile with it, and compare the results by sparsify eval",
        )
    check_world(world)
    world.share(pipelines, "passes", "passes")
    if resume and output is None:
        raise SpecError("--resume", found="no output, beside which passes would be kept", do="Name the folder with -o")
    if not isinstance(calibration, Calibration):
        calibration = named_or_given(calibration)
    data = None if data is None else str(data)
    check_named(calibration, data)
    if not world.leads:
        output = None
    with ExitStack() as stack:
        stack.enter_context(shown(progress, observe))
        staging = None
        if output is not None:
            # Claimed now: another job on it is told before hours of work, not after.
            local = Path(model) if kind_at(model) else None
            staging = stack.enter_context(Staging(Path(output), overwrite=overwrite, source=local))
        context = Context(resolve_device(device), parse_bytes(memory), seed)
        asked = settings_of(schedule, context, {"compute dtype": compute_dtype, "adapter": adapter})
        if output is not None:
            look(Path(output), asked, resume=resume)
        source = open_source(
            model,
            allow_bin=allow_bin,
            trust_remote_code=trust_remote_code,
            check=check,
            allow_nan=allow_nan,
            compute_dtype=compute_dtype,
            strict=strict,
            adapter=adapter,
        )
        chat = Chat(source, chat_template)
        both = data is not None and isinstance(calibration, str) and same_source(calibration, data)
        text: tuple[Tensor, str] | None = None
        if data is not None:
            text = evaluation_windows(data, source, sequence_length, windows, chat, both=both)
        drawn = load_calibration(
            calibration,
            source,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            rows=most_rows(parsed),
            chat=chat,
            both=both,
        )
        chat.check_used("--calibration or --data")

        def quality(pruned: Source) -> float | None:
            return None if text is None else perplexity(pruned, text[0], context)

        def measured(spec: str) -> dict[str, Any]:
            """One pass, and of its sites the block and the kind; as it is kept, and told to other processes."""
            world.says(f"comparing {spec or 'the dense model'}")
            if not spec:
                return asdict(ComparedPass("dense", quality(source), None, 1.0, 0.0, None))
            reset = reset_peak(context.device)
            started = time.perf_counter()
            with Scratch("sparsify-compare") as folder:
                made = compile(
                    model,
                    split_pipeline(spec),
                    calibration=drawn,
                    schedule=schedule,
                    output=Path(folder) / "pruned",
                    device=device,
                    memory=memory,
                    allow_bin=allow_bin,
                    trust_remote_code=trust_remote_code,
                    check=check,
                    allow_nan=allow_nan,
                    compute_dtype=compute_dtype,
                    strict=strict,
                    adapter=adapter,
                    # A pass is kept when it is finished.
                    journal=False,
                )
                seconds, peak = time.perf_counter() - started, recent_peak(context.device) if reset else None
                pruning = [run for run in made.runs if run.targets]
                sites: list[SiteResult] = [site for run in pruning for site in run.sites]
                pruned = list({s.name: s for run in pruning for target in run.targets for s in target.sites}.values())
                errors = drift(made.program, pruned, drawn.batches, made.dense or source.weights, context)
                row = ComparedPass(
                    name=spec,
                    perplexity=quality(replace(source, weights=made.program.weights)),
                    error=sum(errors.values()) / len(errors) if errors else None,
                    kept=pruning[-1].kept,
                    seconds=seconds,
                    memory=peak,
                    errors=errors,
                    notes=[
                        *(f"{site.name}: {note}" for site in sites for note in site.notes),
                        *(
                            f"{region.name} gained nothing and stayed as it was"
                            for run in made.runs
                            for region in run.regions
                            if region.rate is None
                        ),
                    ],
                )
                places = {site.name: [site.block or "", site.kind] for site in pruned}
                return {"row": asdict(row), "places": places}

        held_out = None if text is None else digest(text[0])
        told = {"passes": list(passes), "calibration data": drawn.digest, "held-out data": held_out}
        agree_on_model(source, {**asked, **told}, world)
        own_kept = NOT_KEPT
        if output is not None:
            whole = {**asked, **model_of(source), "calibration data": drawn.digest, "held-out data": held_out}
            own_kept = Kept(0, stack.enter_context(Journal(Path(output), whole, resume=resume)))
        kept = shared(own_kept, world)
        # The dense model has no spec.
        keys = ["", *passes]
        found: dict[str, Mapping[str, Any]] = {key: entry.row for key in keys if (entry := kept.find(key)) is not None}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        for start in range(0, len(missing), world.size):
            some = missing[start : start + world.size]
            own = measured(some[world.rank]) if world.rank < len(some) else None
            for key, row in zip(some, world.told(own), strict=False):
                found[key] = row
                own_kept.add(key, row, {})
        rows = [ComparedPass(**found[""]), *(ComparedPass(**found[spec]["row"]) for spec in passes)]
        where = {n: (block, kind) for spec in passes for n, (block, kind) in found[spec]["places"].items()}
        result = Compared(
            source.name,
            f"{drawn.size}: {drawn.said}",
            None if text is None else f"{len(text[0])} windows of {text[0].shape[1]} tokens of {text[1]}",
            schedule,
            rows,
            sites=where,
        )
        if staging is not None:
            write(result, staging.folder)
            result.output = staging.commit()
            if own_kept.journal is not None:
                own_kept.journal.forget()
        return result


def write(comparison: Compared, folder: Path) -> None:
    """``compare.json``, ``compare.md``, ``compare.png`` and ``compare.svg`` in ``folder``."""
    (folder / "compare.json").write_text(json.dumps(comparison.as_dict(), indent=2) + "\n", encoding="utf-8")
    heading = f"# {comparison.model}\n\ncalibration: {comparison.calibration}\n"
    if comparison.data is not None:
        heading += f"\nperplexity: {comparison.data}\n"
    (folder / "compare.md").write_text(f"{heading}\n{comparison.markdown()}", encoding="utf-8")
    for name in ("compare.png", "compare.svg"):
        draw(comparison, folder / name)
