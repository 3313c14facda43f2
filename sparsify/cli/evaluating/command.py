"""``sparsify eval``. Imports nothing heavy before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.options import (
    AdapterWord,
    AllowBin,
    AllowNan,
    AsJson,
    ChatTemplate,
    Compute,
    Debug,
    Device,
    Length,
    LogLevel,
    Memory,
    NoCheck,
    Processes,
    Quiet,
    Strict,
    Trust,
    command_errors,
    joined,
    launched,
)
from sparsify.errors import SpecError
from sparsify.words import check_adapter, check_compute_dtype, parse_bytes


def eval_command(
    models: Annotated[
        list[str], typer.Argument(help="Hugging Face folders, hub ids, GGUF or ONNX.", metavar="MODEL...")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="As --calibration; of sources in parts the held-out one. For image classifiers a folder with one "
            "folder of pictures for each class.",
            metavar="TEXT",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks and groups of lm-eval, wanda7, YAML files or folders of them; repeated or with commas.",
            metavar="TASKS",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question. [default: as each task says]", metavar="N")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first N documents of each task, or N pictures.", metavar="N")
    ] = None,
    include: Annotated[
        list[Path] | None, typer.Option(help="Folder of YAML files whose tasks may be named too.", metavar="DIR")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions or pictures at a time.", metavar="N")] = 8,
    sequence_length: Length = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows of TEXT.", min=1)] = None,
    as_json: AsJson = False,
    device: Device = "auto",
    memory: Memory = "8GiB",
    allow_bin: AllowBin = False,
    no_check: NoCheck = False,
    allow_nan: AllowNan = False,
    compute_dtype: Compute = None,
    chat_template: ChatTemplate = None,
    strict: Strict = False,
    adapter: AdapterWord = None,
    processes: Processes = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
) -> None:
    """Each MODEL on TEXT (perplexity), by TASKS (accuracy, as lm-eval asks), or on pictures, against the first.

    Perplexity is by the papers' protocol: disjoint windows, mean loss of each.
    """
    with command_errors(debug, log_level):
        check_compute_dtype(compute_dtype)
        check_adapter(adapter)
        parse_bytes(memory)
        from sparsify.quality.tasks.names import check_asked

        check_asked(tasks, num_fewshot, bool(include), limit, batch_size)
        if data is None and tasks is None:
            raise SpecError("eval", found="nothing to evaluate on", do="Give --data TEXT, --tasks boolq,rte, or both")
        if launched(processes):
            return
        from sparsify.cli.console import Terminal
        from sparsify.cli.results import evaluations_as_dicts
        from sparsify.cli.tables import evaluation_report
        from sparsify.evaluation.evaluate import evaluate
        from sparsify.frontend.stores import find_folder
        from sparsify.host import resolve_device
        from sparsify.progress import ProgressLine
        from sparsify.quality.tasks.chosen import named

        results = []
        with joined(device) as (world, own):
            quiet = quiet or not world.leads
            with ProgressLine(quiet=quiet or as_json):
                resolve_device(own)
                # A name with a slip in it is told before the models beside it are measured.
                for model in models:
                    find_folder(model)
                # Their names, and then their data, are read once for all models.
                wanted = None if tasks is None else named(tasks, include or ())
            for model in models:
                with ProgressLine(quiet=quiet or as_json):
                    result = evaluate(
                        model,
                        data,
                        tasks=wanted,
                        num_fewshot=num_fewshot,
                        limit=limit,
                        batch_size=batch_size,
                        windows=windows,
                        sequence_length=sequence_length,
                        device=own,
                        memory=memory,
                        allow_bin=allow_bin,
                        trust_remote_code=trust_remote_code,
                        check=not no_check,
                        allow_nan=allow_nan,
                        compute_dtype=compute_dtype,
                        chat_template=chat_template,
                        strict=strict,
                        adapter=adapter,
                        world=world,
                    )
                results.append((model, result))
        if not world.leads:
            return
        if as_json:
            rows = evaluations_as_dicts(results)
            print(json.dumps(rows[0] if len(rows) == 1 else rows))
        else:
            Terminal(quiet=quiet).print(evaluation_report(results))
