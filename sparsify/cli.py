"""The command line: ``sparsify compile | compare | inspect | eval | passes`` and the backends' own commands.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparsify.errors import SparsifyError, SpecError, first_line

app = typer.Typer(
    help="Prune large language models after training, and write them sparse.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="Hugging Face folder or hub id.", metavar="MODEL")]
AllowBin = Annotated[bool, typer.Option("--allow-bin", help="Read pytorch_model.bin (weights only, no code).")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings along.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Length = Annotated[int | None, typer.Option(help="Tokens per sequence. [default: min(2048, the model's context)]")]
Memory = Annotated[str, typer.Option(help="Memory for activations; past it they go to a file.", metavar="SIZE")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


@app.command("compile")
def compile_command(
    model: Model,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            help="NAME:PATTERN[,OPTION=VALUE]…, e.g. wanda:2:4; several run in order.",
            metavar="SPEC",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write. [default: NAME-PASS here]", metavar="OUT"),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to", help="What to write: hf, an ordinary checkpoint; onnx[:OPTION=VALUE,…].", metavar="BACKEND"
        ),
    ] = "hf",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, FILE.jsonl[:field], FILE.parquet[:field], FILE.safetensors of ids, python-stdlib, c4, a "
            "data set id, self, random; for vision models a folder of images. [default: c4, else self]",
            metavar="DATA",
        ),
    ] = None,
    schedule: Annotated[str, typer.Option(help="layer, block (as the papers do) or dense.")] = "layer",
    samples: Annotated[int | None, typer.Option(help="Calibration sequences. [default: 128; 32 for self]")] = None,
    sequence_length: Length = None,
    seed: Annotated[int, typer.Option(help="Seed for drawing sequences.")] = 0,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave these dense: names, globs, re:…", metavar="NAME")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Prune only these: names, globs, re:…", metavar="NAME")] = None,
    device: Device = "auto",
    memory: Memory = "8GiB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be pruned, and stop.")] = False,
    allow_bin: AllowBin = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
) -> None:
    """Prune MODEL with the given passes and write the result to OUT."""
    with command_errors(debug, log_level):
        console = Console(quiet=quiet, soft_wrap=False)
        specs = passes or []
        _check_words(specs, schedule, to)
        from sparsify.compiler import compile, default_output
        from sparsify.progress import ProgressLine
        from sparsify.report import plan_report, result_report

        name = (
            Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model.rpartition("/")[2]
        )
        out = output or default_output(name, specs, to)
        started = time.perf_counter()
        with ProgressLine(console, not quiet) as line:
            compiled = compile(
                model, specs, calibration=calibration, schedule=schedule, output=out, to=to,  # type: ignore[arg-type]
                samples=samples, sequence_length=sequence_length, seed=seed, ignore=ignore or (), only=only or (),
                device=device, memory=memory, overwrite=overwrite, dry_run=dry_run, allow_bin=allow_bin,
                trust_remote_code=trust_remote_code, observe=line.compiling,
            )  # fmt: skip
        if dry_run:
            console.print(plan_report(compiled))
            return
        if compiled.calibration is not None:
            data = compiled.calibration
            style = "bold red" if "NOT text" in data.label else None
            console.print(f"calibrated on {data.size}: {data.label}", style=style)
        console.print(result_report(compiled, time.perf_counter() - started))
        for note in compiled.notes:
            console.print(note)
        console.print(f"wrote {compiled.output}")


@app.command("inspect")
def inspect_command(
    model: Model,
    as_json: AsJson = False,
    dot: Annotated[Path | None, typer.Option(help="Write the groups as a DOT graph.", metavar="FILE")] = None,
    dimensions: Annotated[
        bool, typer.Option("--dimensions", help="The dimensions that must shrink together, instead.")
    ] = False,
    allow_bin: AllowBin = False,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Show what the compiler sees in MODEL: linear sites, input groups, shapes, regions. Reads no weights."""
    with command_errors(debug, "error"):
        from sparsify.dimension_report import DimensionReport, inspect_dimensions
        from sparsify.inspection import Inspection, inspect

        look = inspect_dimensions if dimensions else inspect
        found: Inspection | DimensionReport = look(model, allow_bin=allow_bin, trust_remote_code=trust_remote_code)
        if dot is not None:
            dot.write_text(found.dot(), encoding="utf-8")
        print(json.dumps(found.as_dict(), indent=2) if as_json else "\n".join(found.lines()))


@app.command("eval")
def eval_command(
    models: Annotated[list[str], typer.Argument(help="Hugging Face folders or hub ids.", metavar="MODEL...")],
    data: Annotated[str, typer.Option(help="As --calibration; of sources in parts the held-out one.", metavar="TEXT")],
    sequence_length: Length = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows.", min=1)] = None,
    as_json: AsJson = False,
    device: Device = "auto",
    memory: Memory = "8GiB",
    allow_bin: AllowBin = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
) -> None:
    """Perplexity of each MODEL on TEXT by the papers' protocol: disjoint windows, mean loss per window."""
    with command_errors(debug, log_level):
        from sparsify.compiler import parse_bytes, resolve_device
        from sparsify.evaluate import evaluate
        from sparsify.progress import ProgressLine
        from sparsify.report import evaluation_report

        results = []
        for model in models:
            with ProgressLine(Console(stderr=True), not (quiet or as_json)) as line:
                result = evaluate(
                    model, data, sequence_length=sequence_length, windows=windows, device=resolve_device(device),
                    memory=parse_bytes(memory), allow_bin=allow_bin, trust_remote_code=trust_remote_code,
                    observe=line.evaluating,
                )  # fmt: skip
            results.append((model, result))
        if as_json:
            rows = [{"model": model, **vars(result)} for model, result in results]
            print(json.dumps(rows[0] if len(rows) == 1 else rows))
        else:
            Console(quiet=quiet).print(evaluation_report(results))


@app.command("compare")
def compare_command(
    model: Model,
    passes: Annotated[
        str, typer.Option("--passes", help="Specs with commas between: wanda:2:4,sparsegpt:2:4,…", metavar="SPECS")
    ],
    data: Annotated[
        str | None, typer.Option(help="Held-out text for perplexity, as for eval. [default: none]", metavar="TEXT")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="As for compile.", metavar="DATA")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for table, JSON and picture.", metavar="OUT")
    ] = None,
    schedule: Annotated[str, typer.Option(help="layer, block or dense.")] = "layer",
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    sequence_length: Length = None,
    windows: Annotated[int | None, typer.Option(help="Evaluate the first so many windows.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed for drawing sequences.")] = 0,
    device: Device = "auto",
    memory: Memory = "8GiB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: AsJson = False,
    allow_bin: AllowBin = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
) -> None:
    """Prune MODEL by each pass on the same calibration tokens; one table and one picture."""
    with command_errors(debug, log_level):
        from sparsify.comparison import compare, split_specs
        from sparsify.progress import ProgressLine
        from sparsify.report import comparison_report

        specs = split_specs(passes)
        _check_words(specs, schedule, "hf")
        with ProgressLine(Console(stderr=True), not (quiet or as_json)) as line:
            result = compare(
                model, specs, data=data, calibration=calibration, windows=windows, samples=samples,
                sequence_length=sequence_length, seed=seed, schedule=schedule, output=output,  # type: ignore[arg-type]
                overwrite=overwrite, device=device, memory=memory, allow_bin=allow_bin,
                trust_remote_code=trust_remote_code, observe=line.compiling,
            )  # fmt: skip
        if as_json:
            print(json.dumps(result.as_dict()))
            return
        console = Console(quiet=quiet)
        console.print(comparison_report(result))
        if result.output is not None:
            console.print(f"wrote {result.output}")


@app.command("passes")
def passes_command() -> None:
    """List the pruning methods and their options."""
    from sparsify.spec import describe_passes

    for name, summary, options in describe_passes():
        print(f"{name}:PATTERN  {summary}" if summary else f"{name} has")
        for option, meaning in options.items():
            print(f"    {option}={meaning}")


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("sparsify-fx"))
        raise typer.Exit


def main() -> None:
    application()()


def application() -> typer.Typer:
    """The commands of this file and those that backends bring."""
    from sparsify.registry import registered

    known = {command.name for command in app.registered_commands}
    for name, entry in registered("sparsify.commands").items():
        if name not in known:
            app.command(name)(entry.load())
    return app


def _check_words(specs: list[str], schedule: str, to: str) -> None:
    """Check the words of the command before anything large is imported or read."""
    from sparsify.spec import parse_backend, parse_pass

    for spec in specs:
        parse_pass(spec)
    if parse_backend(to).needs_pass and not specs:
        raise SpecError("compile", found="no --pass", do="Give one, e.g. --pass wanda:2:4; see sparsify passes")


@contextlib.contextmanager
def command_errors(debug: bool, log_level: str) -> Iterator[None]:
    """Errors as sentences with the right exit code; a terminated process cleans up like an interrupted one."""
    _set_logging(log_level)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except (typer.Exit, SystemExit):
        raise
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written")
        raise SystemExit(130) from None
    except SparsifyError as error:
        if debug:
            raise
        _complain(str(error))
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if debug:
            raise
        _complain(f"unexpected {type(error).__name__}: {first_line(error)} (run again with --debug for the traceback)")
        raise SystemExit(1) from None


def _complain(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/]: {_escape(message)}", highlight=False)


def _escape(text: str) -> Any:
    from rich.markup import escape

    return escape(text)


def _set_logging(level: str) -> None:
    number = logging.getLevelNamesMapping().get(level.upper()) if hasattr(logging, "getLevelNamesMapping") else None
    number = number or {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}.get(level.upper())
    if number is None:
        _complain(f"log level '{level}': no such level. Choose debug, info, warning or error")
        raise SystemExit(2)
    # Read by transformers and the hub when they are first imported; a user's own setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error" if number >= logging.WARNING else level.lower())
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error" if number >= logging.WARNING else level.lower())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.basicConfig(level=number)
    if number >= logging.WARNING:
        # What the hub's client and its transport say of their retries is not about the user's command.
        for name in ("huggingface_hub", "datasets", "httpx", "transformers", "torch"):
            logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
