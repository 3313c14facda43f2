"""The commands that come with ONNX: ``sparsify run`` and ``expand``. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.options import AllowNan, AsJson, Debug, NoCheck, Quiet, command_errors
from sparsify.cli.terminal import say

Folder = Annotated[Path, typer.Argument(help="Folder with model.onnx, or an ONNX file.", metavar="OUT")]


def run(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(help="How many tokens to write at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0, max=1e6)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest; 0: all.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed for drawing.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="0: as many as onnxruntime likes.", min=0)] = 0,
    no_check: NoCheck = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the text and errors only.")] = False,
    debug: Debug = False,
) -> None:
    """Write text with OUT in onnxruntime, token by token."""
    with command_errors(debug, "error"):
        from sparsify.backends.onnx.running.talk import talk
        from sparsify.cli.console import Terminal

        for piece in talk(
            folder,
            prompt,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            device=device,
            threads=threads,
            check=not no_check,
        ):
            say(piece.text, lines=True, end="", flush=True)
        say("")
        Terminal(stderr=True, quiet=quiet).print(
            f"{piece.count} tokens, {piece.rate:.1f} a second after the first (the prompt took {piece.first:.2f} s)",
            style="dim",
        )


def expand(
    folder: Folder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write. [default: in place]", metavar="DENSE")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DENSE: an older output or a model, no other folder.")
    ] = False,
    as_json: AsJson = False,
    no_check: NoCheck = False,
    allow_nan: AllowNan = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Unpack OUT, written with onnx:weights=packed or sparse: dense safetensors, and model.onnx pointing into them."""
    with command_errors(debug, "error"):
        from sparsify.backends.onnx.expand import expand as unpack_folder
        from sparsify.progress import ProgressLine

        with ProgressLine(quiet=quiet or as_json):
            wrote = unpack_folder(folder, output, overwrite=overwrite, check=not no_check, allow_nan=allow_nan)
        if as_json or not quiet:
            say(json.dumps({"output": str(wrote)}) if as_json else f"wrote {wrote}")
