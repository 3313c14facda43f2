"""The command that comes with packed folders: ``sparsify unpack``. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.options import AllowNan, AsJson, Debug, NoCheck, Quiet, Trust, command_errors
from sparsify.cli.terminal import say

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
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the packed OUT as the dense checkpoint that it was made from, bit for bit."""
    with command_errors(debug, "error"):
        from sparsify.backends.packed.unpack import unpack_folder
        from sparsify.progress import ProgressLine

        with ProgressLine(quiet=quiet or as_json):
            wrote = unpack_folder(
                folder,
                output,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                check=not no_check,
                allow_nan=allow_nan,
            )
        if as_json or not quiet:
            say(json.dumps({"output": str(wrote)}) if as_json else f"wrote {wrote}")
