"""``sparsify search`` and ``sparsify sensitivity``. Imports nothing heavy before a command runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Ignore,
    Length,
    LogLevel,
    Memory,
    Model,
    NoCheck,
    Only,
    Overwrite,
    Quiet,
    Samples,
    Seed,
    Strict,
    Trust,
    command_errors,
)
from sparsify.method.spec import check_pass, parse_backend
from sparsify.searching.budget import parse_budget
from sparsify.searching.trials import work_folder
from sparsify.words import (
    check_adapter,
    check_amount,
    check_compute_dtype,
    check_schedule,
    check_seed,
    one_of,
    parse_bytes,
    plain,
    split_names,
)

if TYPE_CHECKING:
    from sparsify.cli.console import Terminal

Data = Annotated[
    str,
    typer.Option(help="Text that judges, as for eval; held out from what calibrates.", metavar="TEXT"),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="As for compile. [default: the other part of TEXT: its training half or first 90%]", metavar="DATA"
    ),
]
Windows = Annotated[int | None, typer.Option(help="Judge by the first so many windows.", min=1)]


def search_command(
    model: Model,
    method: Annotated[
        str,
        typer.Option(
            "--pass",
            help="Without a pattern (twin) percentages are searched; with one (wanda:2:4) what is pruned to it.",
            metavar="SPEC",
        ),
    ],
    budget: Annotated[
        str,
        typer.Option(
            help='"perplexity<=1.05" or "perplexity<=+5%": against the dense model\'s; "perplexity<=12.3abs".',
            metavar="BUDGET",
        ),
    ],
    data: Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; trials are kept in OUT.search.", metavar="OUT")
    ],
    to: Annotated[str, typer.Option("--to", help="What to write, as for compile.", metavar="BACKEND")] = "hf",
    calibration: Calibration = None,
    schedule: Annotated[str, typer.Option(help="layer, block or dense (wanda's statistics taken once).")] = "layer",
    samples: Samples = None,
    sequence_length: Length = None,
    windows: Windows = None,
    seed: Seed = 0,
    ignore: Ignore = None,
    only: Only = None,
    device: Device = "auto",
    memory: Memory = "8GiB",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    allow_bin: AllowBin = False,
    no_check: NoCheck = False,
    allow_nan: AllowNan = False,
    compute_dtype: Compute = None,
    chat_template: ChatTemplate = None,
    strict: Strict = False,
    adapter: AdapterWord = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
) -> None:
    """Write the sparsest MODEL within a budget of quality, kind by kind of layer; run again, it goes on."""
    with command_errors(debug, log_level):
        parse_budget(budget)
        check_pass(method)
        parse_backend(to)
        _check(samples, sequence_length, seed, memory, compute_dtype, adapter)
        chosen = check_schedule(schedule)
        from sparsify.cli.console import Terminal
        from sparsify.cli.searching.tables import again, search_report
        from sparsify.progress import ProgressLine
        from sparsify.searching.search import search

        console, log = Terminal(quiet=quiet or as_json), Terminal(stderr=True, quiet=quiet, soft_wrap=True)
        with ProgressLine(quiet=quiet or as_json), _kept(output, log):
            found = search(
                model,
                method,
                budget=budget,
                data=data,
                output=output,
                to=to,
                calibration=calibration,
                windows=windows,
                samples=samples,
                sequence_length=sequence_length,
                seed=seed,
                schedule=chosen,
                ignore=split_names(ignore or ()),
                only=split_names(only or ()),
                device=device,
                memory=memory,
                overwrite=overwrite,
                allow_bin=allow_bin,
                trust_remote_code=trust_remote_code,
                check=not no_check,
                allow_nan=allow_nan,
                compute_dtype=compute_dtype,
                chat_template=chat_template,
                strict=strict,
                adapter=adapter,
                tell=lambda text: log.print(text, highlight=False),
            )
        if as_json:
            print(json.dumps(found.as_dict()))
            return
        console.print(search_report(found))
        # To be pasted: not cut into lines.
        console.print(f"the same again: {plain(again(found))}", soft_wrap=True)
        for note in found.compiled.notes if found.compiled is not None else ():
            console.print(plain(note))
        console.print(f"wrote {plain(str(found.output))}; every trial is kept in {plain(str(found.kept))}")


@contextlib.contextmanager
def _kept(output: Path, log: Terminal) -> Iterator[None]:
    """Who stops a search is told that it goes on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        log.print(plain(f"stopped; the same command goes on from the trials in {work_folder(output)}"))
        raise


def sensitivity_command(
    model: Model,
    method: Annotated[str, typer.Option("--pass", help="With a pattern: wanda:2:4, twin:50%.", metavar="SPEC")],
    data: Data,
    measure: Annotated[
        str | None,
        typer.Option(
            "--measure", help="perplexity or kl. [default: perplexity below 96 parts, else kl]", metavar="WORD"
        ),
    ] = None,
    leave: Annotated[int, typer.Option(help="Percent of the loss that --ignore is to take away.", min=1, max=99)] = 30,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for table, JSON and heat map.", metavar="DIR")
    ] = None,
    calibration: Calibration = None,
    samples: Samples = None,
    sequence_length: Length = None,
    windows: Windows = None,
    seed: Seed = 0,
    ignore: Ignore = None,
    only: Only = None,
    device: Device = "auto",
    memory: Memory = "8GiB",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    allow_bin: AllowBin = False,
    no_check: NoCheck = False,
    allow_nan: AllowNan = False,
    compute_dtype: Compute = None,
    chat_template: ChatTemplate = None,
    strict: Strict = False,
    adapter: AdapterWord = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
) -> None:
    """What pruning each kind of layer costs in each block, ranked, and the --ignore line that saves most of it."""
    with command_errors(debug, log_level):
        check_pass(method)
        if measure is not None:
            one_of(measure, ("perplexity", "kl"), "measure")
        _check(samples, sequence_length, seed, memory, compute_dtype, adapter)
        from sparsify.cli.console import Terminal
        from sparsify.cli.searching.tables import sensitivity_report
        from sparsify.progress import ProgressLine
        from sparsify.searching.sensitivity import sensitivity

        console, log = Terminal(quiet=quiet or as_json), Terminal(stderr=True, quiet=quiet or as_json, soft_wrap=True)
        with ProgressLine(quiet=quiet or as_json):
            result = sensitivity(
                model,
                method,
                data=data,
                measure=measure,
                leave=leave / 100,
                output=output,
                calibration=calibration,
                windows=windows,
                samples=samples,
                sequence_length=sequence_length,
                seed=seed,
                ignore=split_names(ignore or ()),
                only=split_names(only or ()),
                device=device,
                memory=memory,
                overwrite=overwrite,
                allow_bin=allow_bin,
                trust_remote_code=trust_remote_code,
                check=not no_check,
                allow_nan=allow_nan,
                compute_dtype=compute_dtype,
                chat_template=chat_template,
                strict=strict,
                adapter=adapter,
                tell=lambda text: log.print(text, highlight=False),
            )
        if as_json:
            print(json.dumps(result.as_dict()))
            return
        console.print(sensitivity_report(result))
        console.print(result.ignore_line, style="bold", soft_wrap=True)
        if result.output is not None:
            console.print(f"wrote {plain(str(result.output))}")


def _check(
    samples: int | None, length: int | None, seed: int, memory: str, compute: str | None, adapter: str | None
) -> None:
    """Refuse wrong words before anything large is imported."""
    check_amount(samples, length)
    check_seed(seed)
    parse_bytes(memory)
    check_compute_dtype(compute)
    check_adapter(adapter)
