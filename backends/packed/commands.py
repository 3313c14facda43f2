"""The commands that come with packed folders: ``sparsify unpack`` and ``bench``. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.options import AllowNan, AsJson, Debug, NoCheck, Trust, command_errors
from sparsify.cli.terminal import Terminal, say

Folder = Annotated[Path, typer.Argument(help="Folder that compile --to packed wrote.", metavar="OUT")]


def unpack(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", metavar="DENSE")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DENSE: an older output or a model, no other folder.")
    ] = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    allow_nan: AllowNan = False,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Write the packed OUT as the dense checkpoint that it was made from, bit for bit."""
    with command_errors(debug, "error"):
        from sparsify.backends.packed.unpack import unpack_folder
        from sparsify.progress import ProgressLine

        with ProgressLine(quiet=as_json):
            wrote = unpack_folder(
                folder,
                output,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                check=not no_check,
                allow_nan=allow_nan,
            )
        say(json.dumps({"output": str(wrote)}) if as_json else f"wrote {wrote}")


def bench(
    folder: Folder,
    against: Annotated[
        str | None, typer.Option(help="Dense folder or hub id. [default: OUT's own weights, unpacked]", metavar="MODEL")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds; medians count.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="0: as many as torch takes.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", metavar="DEVICE")] = "cpu",
    no_tune: Annotated[bool, typer.Option("--no-tune", help="Built-in defaults for the GPU's kernels.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for bench.json and bench.png.", metavar="DIR")
    ] = None,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure OUT against the dense model: prefill and decode, size, loading, memory, and every layer."""
    with command_errors(debug, "error"):
        import torch

        from sparsify.backends.packed.bench.measure import bench as measure
        from sparsify.backends.packed.bench.report import benchmark_report, write_report
        from sparsify.progress import ProgressLine
        from sparsify.words import check_threads

        check_threads(threads)
        if threads:
            torch.set_num_threads(threads)
        with ProgressLine(quiet=as_json):
            result = measure(
                folder,
                against,
                prompt=prompt,
                tokens=tokens,
                rounds=rounds,
                device=device,
                tune=not no_tune,
                trust_remote_code=trust_remote_code,
                check=not no_check,
            )
        if output is not None:
            write_report(result, output)
        if as_json:
            say(json.dumps(result.as_dict()))
            return
        Terminal().print(benchmark_report(result))
        if output is not None:
            say(f"wrote {output / 'bench.json'} and {output / 'bench.png'}")
