"""``sparsify bench``. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.options import AsJson, Debug, NoCheck, Quiet, Trust, command_errors
from sparsify.cli.terminal import say


def bench(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of a model: packed, ordinary, of ragged widths, or ONNX.", metavar="OUT"),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="Folder of any kind, or hub id. [default: of a packed OUT its own weights, unpacked]", metavar="MODEL"
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds; medians count.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="0: as many as torch takes.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", metavar="DEVICE")] = "cpu",
    no_tune: Annotated[bool, typer.Option("--no-tune", help="Built-in defaults for the GPU's kernels.")] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also against llama.cpp and onnxruntime-genai on MODEL, where installed.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for bench.json and bench.png.", metavar="DIR")
    ] = None,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure OUT against another model: prefill and decode, size, loading, memory, and every packed layer."""
    with command_errors(debug, "error"):
        import torch

        from sparsify.backends.bench.measure import bench as measure
        from sparsify.backends.bench.report import benchmark_report, write_report
        from sparsify.cli.console import Terminal
        from sparsify.progress import ProgressLine
        from sparsify.words import check_threads

        check_threads(threads)
        if threads:
            torch.set_num_threads(threads)
        with ProgressLine(quiet=quiet or as_json):
            result = measure(
                folder,
                against,
                prompt=prompt,
                tokens=tokens,
                rounds=rounds,
                device=device,
                tune=not no_tune,
                peers=peers,
                trust_remote_code=trust_remote_code,
                check=not no_check,
            )
        if output is not None:
            write_report(result, output)
        if as_json:
            say(json.dumps(result.as_dict()))
            return
        Terminal(quiet=quiet).print(benchmark_report(result))
        if output is not None and not quiet:
            say(f"wrote {output / 'bench.json'} and {output / 'bench.png'}")
