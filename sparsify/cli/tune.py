"""``sparsify tune`` at the command line. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.options import (
    AllowNan,
    AsJson,
    ChatTemplate,
    Debug,
    Device,
    NoCheck,
    Processes,
    Quiet,
    Trust,
    command_errors,
    joined,
    launched,
)
from sparsify.cli.terminal import say
from sparsify.method.spec import parse_backend
from sparsify.tuning.recipe import Recipe, check_method


def tune_command(
    model: Annotated[Path, typer.Argument(help="Folder of a pruned (or any) causal language model.", metavar="OUT")],
    data: Annotated[
        str,
        typer.Option(help="As --calibration of compile; its held-out part or last tenth validates.", metavar="DATA"),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", metavar="TUNED")],
    validation: Annotated[
        str | None, typer.Option(help="Validate on this instead, and train on all of DATA.", metavar="DATA")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Learn the predictions of this model, the dense one mostly.", metavar="MODEL")
    ] = None,
    distill: Annotated[
        float | None, typer.Option(help="Their share in the loss; of the text itself the rest. [default: 0.5]")
    ] = None,
    method: Annotated[str, typer.Option(help="lora or full.")] = "lora",
    targets: Annotated[
        str | None,
        typer.Option(
            help="Layers that LoRA is put on: q,v or names or globs. [default: every linear one]", metavar="NAMES"
        ),
    ] = None,
    to: Annotated[str, typer.Option("--to", help="What to write, as for compile.", metavar="BACKEND")] = "hf",
    adapter: Annotated[bool, typer.Option("--adapter", help="Write LoRA's adapter alone, not merged.")] = False,
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 8,
    alpha: Annotated[int, typer.Option(help="Of LoRA.")] = 16,
    dropout: Annotated[float, typer.Option(help="Of LoRA.")] = 0.05,
    rate: Annotated[float | None, typer.Option(help="Learning rate. [default: 3e-4 for lora, 2e-5 for full]")] = None,
    warmup: Annotated[int, typer.Option(help="Steps.")] = 100,
    epochs: Annotated[int, typer.Option(help="Over the samples.")] = 2,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop training after so many.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 64,
    micro: Annotated[int, typer.Option(help="Of them at once.")] = 4,
    samples: Annotated[int, typer.Option(help="Sequences drawn.")] = 2000,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of each. [default: min(256, the model's context)]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of data and order.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between saved states (TUNED.tuning).", min=1)] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from TUNED.tuning.")] = False,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace TUNED: an older output or a model, no other folder.")
    ] = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    allow_nan: AllowNan = False,
    chat_template: ChatTemplate = None,
    processes: Processes = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Recover OUT by training, its zeros held: LoRA merged under the mask, or every weight. Needs the extra `tune`."""
    with command_errors(debug, "error"):
        # Wrong words are refused before anything large is imported.
        recipe = Recipe(
            method=check_method(method),
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rate=rate,
            warmup=warmup,
            epochs=epochs,
            steps=steps,
            minutes=minutes,
            batch=batch,
            micro=micro,
            samples=samples,
            length=sequence_length,
            seed=seed,
            targets=targets,
            distill=distill,
        )
        parse_backend(to)
        if launched(processes):
            return
        from sparsify.host import resolve_device
        from sparsify.progress import ProgressLine
        from sparsify.tuning.tune import tune

        with joined(device) as (world, mine), ProgressLine(quiet=quiet or as_json or not world.leads):
            result = tune(
                model,
                data,
                output,
                recipe,
                to=to,
                adapter=adapter,
                resume=resume,
                save_every=save_every,
                device=resolve_device(mine),
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                check=not no_check,
                allow_nan=allow_nan,
                chat_template=chat_template,
                validation=validation,
                teacher=teacher,
                world=world,
            )
        if not world.leads:
            return
        if as_json:
            print(json.dumps(result.as_dict()))
        if as_json or quiet:
            return
        before, after = result.perplexity
        first, last = (result.losses[0], result.losses[-1]) if result.losses else (0.0, 0.0)
        say(f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s; loss {first:.3f} → {last:.3f}")
        say(f"trained on {result.data}")
        if result.left_out:
            say(f"{result.left_out} sequences of it stand in the validation text, and were left out")
        if result.layers:
            say(f"LoRA on {', '.join(result.layers)}")
        if result.teacher is not None:
            dense = f", {result.teacher['pruned']} of whose weights are pruned" if "pruned" in result.teacher else ""
            say(f"taught by {result.teacher['name']}{dense}, of perplexity {result.teacher['perplexity']:.3f}")
            if "predictions" in result.teacher:
                theirs, ours = result.teacher["predictions"]
                say(f"of its {theirs} predictions the first {ours} were learnt: no token has one of the others")
        say(f"perplexity on {result.validation}: {before:.3f} → {after:.3f}")
        if result.masked:
            say(f"the zeros of {result.masked} weights were held")
        say(f"wrote {result.output}")
