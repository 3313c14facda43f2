"""``sparsify compile``. Imports nothing heavy before it runs."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

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
    Ignore,
    Length,
    LogLevel,
    Memory,
    NoCheck,
    Only,
    Overwrite,
    Processes,
    Quiet,
    Samples,
    Seed,
    Strict,
    Trust,
    command_errors,
    joined,
    launched,
)
from sparsify.cli.terminal import say
from sparsify.compiler.recipe_file import KEYS, read_recipe, save_recipe
from sparsify.errors import SpecError
from sparsify.files.reading import kind_at
from sparsify.method.spec import check_pass, parse_backend, parse_pass, split_pipeline
from sparsify.quantized.otherwise import seems_stored_otherwise
from sparsify.words import (
    check_adapter,
    check_amount,
    check_compute_dtype,
    check_schedule,
    check_seed,
    check_weight_dtype,
    parse_bytes,
    plain,
    split_names,
)
from sparsify.world.joining import leads_told

# Words of the command line that compile() takes by the same name.
_HANDED_ON = (
    "calibration", "to", "samples", "sequence_length", "seed", "ignore", "only", "device", "memory", "overwrite",
    "dry_run", "allow_bin", "trust_remote_code", "allow_nan", "compute_dtype", "chat_template", "strict", "adapter",
    "dtype", "teacher", "eval_windows", "resume", "checkpoint_every",
)  # fmt: skip


def compile_command(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face folder, hub id or GGUF file.", metavar="MODEL")
    ] = None,
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
            help="What to write: hf, an ordinary checkpoint; packed[:layout=auto|packed24|bitmask,"
            "choice=measured|smallest,values=auto|int8|int4|full,group=32|64|128|row,activations=int8|float], smaller "
            "and faster on CPUs; cuda[:policy=decode|prefill|both,"
            "tune=true|false], for NVIDIA GPUs; onnx[:weights=link|external|packed|sparse,opset=18…24,"
            "linear=gemm|matmul,cache=keep|none,dtype=…,compute=…], of sparse also values, group and activations.",
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
    eval: Annotated[
        str | None,
        typer.Option(
            "--eval",
            help="Text to judge by, as `sparsify eval --data` takes it: perplexity before and after, and a verdict.",
            metavar="TEXT",
        ),
    ] = None,
    eval_windows: Annotated[
        int | None, typer.Option("--eval-windows", help="Judge by its first so many windows only.", min=1)
    ] = None,
    schedule: Annotated[str, typer.Option(help="layer, block (as the papers do) or dense.")] = "layer",
    samples: Samples = None,
    sequence_length: Length = None,
    seed: Seed = 0,
    ignore: Ignore = None,
    only: Only = None,
    device: Device = "auto",
    memory: Memory = "8GiB",
    overwrite: Overwrite = False,
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
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="YAML file, or a folder that compile wrote, whose options count where none is given here.",
            metavar="FILE",
        ),
    ] = None,
    save_recipe: Annotated[
        Path | None, typer.Option("--save-recipe", help="Write these options as such a file.", metavar="FILE")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where this very command was interrupted; see docs/resume.md.")
    ] = False,
    no_journal: Annotated[
        bool,
        typer.Option("--no-journal", help="Keep nothing for --resume: less disk, as much as is pruned."),
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            "--checkpoint-every",
            help="Keep activations too, each time so many blocks are done: --resume runs nothing again.",
            min=1,
            metavar="BLOCKS",
        ),
    ] = None,
    processes: Processes = None,
    as_json: AsJson = False,
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
    words = {name: value for name, value in locals().items() if name != "ctx"}
    with command_errors(debug, log_level):
        if recipe is not None:
            words |= {name: value for name, value in read_recipe(recipe).items() if not _is_given(ctx, name)}
        for name in ("passes", "ignore", "only", "print_after"):
            # A recipe may have one text where several may stand.
            words[name] = [words[name]] if isinstance(words[name], str) else list(words[name] or ())
        words |= {name: split_names(words[name]) for name in ("ignore", "only")}
        words |= {name: _path(words[name]) for name in ("output", "chat_template")}
        _compile(words)


def _is_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line itself."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given).expanduser()


def _compile(words: dict[str, Any]) -> None:
    """Check ``words``, options by their names, and run the compile that they ask for."""
    quiet, as_json, specs = words["quiet"] or words["as_json"], words["as_json"], _specs(words["passes"])
    if words["model"] is None:
        raise SpecError("compile", found="no MODEL", do="Name a folder, a hub id or a GGUF file, or give --recipe FILE")
    check_compute_dtype(words["compute_dtype"])
    check_adapter(words["adapter"])
    check_weight_dtype(words["dtype"])
    length, seed = words["sequence_length"], words["seed"]
    check_words(
        specs, words["schedule"], words["memory"], words["to"], words["samples"], length, seed, model=words["model"]
    )
    if as_json and words["print_after"]:
        raise SpecError("--print-after with --json", found="two things to print", do="Leave one of the two out")
    if words["dry_run"] and words["print_after"]:
        raise SpecError(
            f"--print-after {words['print_after'][0]} with --dry-run",
            found="a dry run runs no pass, so there is no graph after one",
            do="Leave one of the two out; `sparsify inspect MODEL --graph` prints the graph as it is",
        )
    if launched(words["processes"]):
        return
    if words["save_recipe"] is not None and leads_told():
        save_recipe(words["save_recipe"], _to_keep(words), overwrite=words["overwrite"])
    from sparsify.cli.console import Terminal
    from sparsify.cli.tables import plan_report, result_report
    from sparsify.compiler.pipeline import compile
    from sparsify.compiler.request import default_output
    from sparsify.progress import ProgressLine

    model = words["model"]
    name = Path(model).expanduser().resolve().name.removesuffix(".gguf") if kind_at(model) else model.rpartition("/")[2]
    out = words["output"] or default_output(name, specs, words["to"])
    shown = GraphPrinter(words["print_after"], [parse_pass(spec).name for spec in specs])
    started = time.perf_counter()
    with ExitStack() as stack:
        world, device = stack.enter_context(joined(words["device"]))
        words = {**words, "device": device}
        # One process speaks for all.
        quiet = quiet or not world.leads
        console = Terminal(quiet=quiet)
        stack.enter_context(ProgressLine(quiet=quiet))
        compiled = compile(
            model,
            words["passes"],
            schedule=check_schedule(words["schedule"]),
            output=out,
            check=not words["no_check"],
            journal=not words["no_journal"],
            tell=lambda text: console.print(text),
            after=shown.after,
            evaluate=words["eval"],
            world=world,
            **{name: words[name] for name in _HANDED_ON},
        )
    seconds = time.perf_counter() - started
    if not world.leads:
        return
    if as_json:
        from sparsify.cli.results import result_as_dict

        say(json.dumps(result_as_dict(compiled, seconds, planned=words["dry_run"])))
        return
    if words["dry_run"]:
        for note in compiled.notes:
            console.print(plain(note))
        console.print(plan_report(compiled))
        return
    if compiled.calibration is not None:
        data = compiled.calibration
        console.print(f"calibrated on {data.size}: {data.said}", style="bold red" if data.plumbing else None)
    console.print(result_report(compiled, seconds))
    for note in compiled.notes:
        console.print(plain(note))
    console.print(f"wrote {plain(str(compiled.output))}")


def _specs(passes: list[Any]) -> list[str]:
    """The specs of passes, those with names of their own among them."""
    return [own["pass"] if isinstance(own, dict) else own for own in passes]


def _to_keep(words: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says: every option that is not its default, paths as they were typed."""
    from sparsify.compiler.recipe import DEFAULTS, as_typed, without_defaults

    told = {key: as_typed(words[key]) for key in ("model", "passes", *KEYS) if key in words}
    return without_defaults(told, {**DEFAULTS, "device": "auto", "memory": "8GiB"})


def check_words(
    specs: list[str],
    schedule: str,
    memory: str,
    to: str,
    samples: int | None,
    length: int | None,
    seed: int,
    *,
    pipelines: bool = False,
    model: object = None,
) -> None:
    """Check the words of the command before anything large is imported or read.

    Args:
        model: what is compiled: one whose weights are stored in another form may be written out without a pass.
    """
    check_amount(samples, length)
    check_seed(seed)
    for spec in specs:
        for part in split_pipeline(spec) if pipelines else [spec]:
            check_pass(part)
    check_schedule(schedule)
    parse_bytes(memory)
    if parse_backend(to).needs_pass and not specs and not seems_stored_otherwise(model):
        raise SpecError("compile", found="no --pass", do="Give one, e.g. --pass wanda:2:4; see sparsify passes")
