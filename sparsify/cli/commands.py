"""``sparsify compile | inspect | eval | compare | passes``. Imports nothing heavy before a command runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.graphs import GraphPrinter
from sparsify.cli.options import (
    AdapterWord,
    AllowBin,
    AllowNan,
    AsJson,
    ChatTemplate,
    Compute,
    Debug,
    Device,
    Dtype,
    Length,
    LogLevel,
    Memory,
    Model,
    NoCheck,
    Quiet,
    Strict,
    Trust,
    command_errors,
)
from sparsify.cli.terminal import Terminal, say
from sparsify.errors import BackendError, SpecError
from sparsify.files.reading import kind_at
from sparsify.method.spec import check_pass, describe_passes, parse_backend, parse_pass, split_pipeline, split_specs
from sparsify.words import (
    check_adapter,
    check_amount,
    check_compute_dtype,
    check_schedule,
    check_seed,
    check_weight_dtype,
    parse_bytes,
    plain,
)


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
            "--to",
            help="What to write: hf, an ordinary checkpoint; packed, cuda or onnx[:OPTION=VALUE,…].",
            metavar="BACKEND",
        ),
    ] = "hf",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, FILE.jsonl[:field], FILE.parquet[:field], FILE.safetensors of ids, a folder of them, "
            "python-stdlib, c4, a data set id, self, random; for vision models a folder of images. "
            "[default: c4, else self]",
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
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT: an older output or a model, no other folder.")
    ] = False,
    print_after: Annotated[
        list[str] | None,
        typer.Option(
            "--print-after", help="Print the graph once this pass has run; `all`: every pass.", metavar="PASS"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be pruned, and stop.")] = False,
    allow_bin: AllowBin = False,
    no_check: NoCheck = False,
    allow_nan: AllowNan = False,
    compute_dtype: Compute = None,
    chat_template: ChatTemplate = None,
    strict: Strict = False,
    adapter: AdapterWord = None,
    dtype: Dtype = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="Dense model that refine fits to. [default: MODEL before it]", metavar="MODEL"),
    ] = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
) -> None:
    """Prune MODEL with the given passes and write the result to OUT."""
    with command_errors(debug, log_level):
        console = Terminal(quiet=quiet)
        specs = passes or []
        check_compute_dtype(compute_dtype)
        check_adapter(adapter)
        check_weight_dtype(dtype)
        _check_words(specs, schedule, memory, to, samples, sequence_length, seed)
        if dry_run and print_after:
            raise SpecError(
                f"--print-after {print_after[0]} with --dry-run",
                found="a dry run runs no pass, so there is no graph after one",
                do="Leave one of the two out; `sparsify inspect MODEL --graph` prints the graph as it is",
            )
        from sparsify.cli.tables import plan_report, result_report
        from sparsify.compiler.pipeline import compile
        from sparsify.compiler.request import default_output
        from sparsify.progress import ProgressLine

        name = (
            Path(model).expanduser().resolve().name.removesuffix(".gguf")
            if kind_at(model)
            else model.rpartition("/")[2]
        )
        out = output or default_output(name, specs, to)
        shown = GraphPrinter(print_after or (), [parse_pass(spec).name for spec in specs])
        started = time.perf_counter()
        with ProgressLine(quiet=quiet):
            compiled = compile(
                model,
                specs,
                calibration=calibration,
                schedule=check_schedule(schedule),
                output=out,
                to=to,
                samples=samples,
                sequence_length=sequence_length,
                seed=seed,
                ignore=ignore or (),
                only=only or (),
                device=device,
                memory=memory,
                overwrite=overwrite,
                dry_run=dry_run,
                allow_bin=allow_bin,
                trust_remote_code=trust_remote_code,
                check=not no_check,
                allow_nan=allow_nan,
                compute_dtype=compute_dtype,
                chat_template=chat_template,
                strict=strict,
                adapter=adapter,
                dtype=dtype,
                teacher=teacher,
                tell=lambda text: console.print(text),
                after=shown.after,
            )
        if dry_run:
            console.print(plan_report(compiled))
            return
        if compiled.calibration is not None:
            data = compiled.calibration
            console.print(f"calibrated on {data.size}: {data.said}", style="bold red" if data.plumbing else None)
        console.print(result_report(compiled, time.perf_counter() - started))
        for note in compiled.notes:
            console.print(plain(note))
        console.print(f"wrote {plain(str(compiled.output))}")


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
        from sparsify.files.single import put_file
        from sparsify.inspection.dimensions import DimensionReport, inspect_dimensions
        from sparsify.inspection.graph import inspect_graph
        from sparsify.inspection.sites import Inspection, inspect

        if graph:
            text = inspect_graph(model, allow_bin=allow_bin, trust_remote_code=trust_remote_code, check=not no_check)
            say(text, lines=True)
            return
        look = inspect_dimensions if dimensions else inspect
        found: Inspection | DimensionReport = look(
            model, allow_bin=allow_bin, trust_remote_code=trust_remote_code, check=not no_check
        )
        if dot is not None:
            put_file(dot, found.dot().encode())
        said = json.dumps(found.as_dict(), indent=2) if as_json else "\n".join(map(plain, found.lines()))
        say(said, lines=True)


def eval_command(
    models: Annotated[list[str], typer.Argument(help="Hugging Face folders or hub ids.", metavar="MODEL...")],
    data: Annotated[str, typer.Option(help="As --calibration; of sources in parts the held-out one.", metavar="TEXT")],
    sequence_length: Length = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows.", min=1)] = None,
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
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
) -> None:
    """Perplexity of each MODEL on TEXT by the papers' protocol: disjoint windows, mean loss per window."""
    with command_errors(debug, log_level):
        check_compute_dtype(compute_dtype)
        check_adapter(adapter)
        from sparsify.cli.tables import evaluation_report
        from sparsify.evaluation.evaluate import evaluate
        from sparsify.progress import ProgressLine

        parse_bytes(memory)
        results = []
        for model in models:
            with ProgressLine(quiet=quiet or as_json):
                result = evaluate(
                    model,
                    data,
                    windows=windows,
                    sequence_length=sequence_length,
                    device=device,
                    memory=memory,
                    allow_bin=allow_bin,
                    trust_remote_code=trust_remote_code,
                    check=not no_check,
                    allow_nan=allow_nan,
                    compute_dtype=compute_dtype,
                    chat_template=chat_template,
                    strict=strict,
                    adapter=adapter,
                )
            results.append((model, result))
        if as_json:
            rows = [{"model": model, **vars(result)} for model, result in results]
            print(json.dumps(rows[0] if len(rows) == 1 else rows))
        else:
            Terminal(quiet=quiet).print(evaluation_report(results))


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
    seed: Annotated[int, typer.Option(help="Seed for drawing sequences.")] = 0,
    device: Device = "auto",
    memory: Memory = "8GiB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT: an older output or a model, no other folder.")
    ] = False,
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
    """Prune MODEL by each pass on the same calibration tokens; one table and one picture."""
    with command_errors(debug, log_level):
        specs = split_specs(passes)
        check_compute_dtype(compute_dtype)
        check_adapter(adapter)
        _check_words(specs, schedule, memory, "hf", samples, sequence_length, seed, pipelines=True)
        from sparsify.cli.tables import comparison_report
        from sparsify.evaluation.compare import compare
        from sparsify.progress import ProgressLine

        with ProgressLine(quiet=quiet or as_json):
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
                device=device,
                memory=memory,
                allow_bin=allow_bin,
                trust_remote_code=trust_remote_code,
                check=not no_check,
                allow_nan=allow_nan,
                compute_dtype=compute_dtype,
                chat_template=chat_template,
                strict=strict,
                adapter=adapter,
            )
        if as_json:
            print(json.dumps(result.as_dict()))
            return
        console = Terminal(quiet=quiet)
        console.print(comparison_report(result))
        if result.output is not None:
            console.print(f"wrote {plain(str(result.output))}")


def passes_command() -> None:
    """List the pruning methods and their options."""
    for name, summary, options in describe_passes():
        say(f"{name}  {summary}" if summary else f"{name} has")
        for option, meaning in options.items():
            say(f"    {option}={meaning}")


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BackendError(f"output {path}", found=f"cannot be written ({error})", do="Choose another place") from error


def _check_words(
    specs: list[str],
    schedule: str,
    memory: str,
    to: str,
    samples: int | None,
    length: int | None,
    seed: int,
    *,
    pipelines: bool = False,
) -> None:
    """Check the words of the command before anything large is imported or read."""
    check_amount(samples, length)
    check_seed(seed)
    for spec in specs:
        for part in split_pipeline(spec) if pipelines else [spec]:
            check_pass(part)
    check_schedule(schedule)
    parse_bytes(memory)
    if parse_backend(to).needs_pass and not specs:
        raise SpecError("compile", found="no --pass", do="Give one, e.g. --pass wanda:2:4; see sparsify passes")
