"""``sparsify verify`` at the command line. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.options import AsJson, Debug, Quiet, command_errors
from sparsify.cli.terminal import say
from sparsify.errors import CheckpointError
from sparsify.files.reading import kind_at


def verify(
    folder: Annotated[
        Path, typer.Argument(help="A folder (ONNX, checkpoint or adapter) or an ONNX file, ours or not.", metavar="OUT")
    ],
    against: Annotated[
        Path | None, typer.Option(help="Checkpoint to compare with. [default: OUT's own]", metavar="MODEL")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="What the pruned weights must hold. [default: as sparsify.json says]")
    ] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Do not load the model into torch.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check OUT: the sparsity along the axis that is summed over, every weight's bits, the outputs against torch."""
    with command_errors(debug, "error"):
        from sparsify.backends.verify.adapter import verify_adapter
        from sparsify.backends.verify.checkpoint import verify_checkpoint
        from sparsify.backends.verify.onnx_folder import verify_onnx
        from sparsify.backends.verify.report import verification_report
        from sparsify.cli.console import Terminal
        from sparsify.progress import ProgressLine

        with ProgressLine(quiet=quiet or as_json):
            if kind_at(folder) is None:
                raise CheckpointError(f"verifying {folder}", found="nothing there", do="Check the path")
            onnx = folder.suffix.lower() == ".onnx" or any(folder.glob("*.onnx"))
            if folder.suffix.lower() == ".gguf":
                raise CheckpointError(
                    f"verifying {folder}",
                    found="a GGUF file, which sparsify reads and does not write",
                    do="Name the folder that was made of it",
                )
            if onnx:
                result = verify_onnx(folder, against=against, pattern=pattern, run=not weights_only)
            elif kind_at(folder / "config.json"):
                result = verify_checkpoint(folder, pattern=pattern)
            elif kind_at(folder / "adapter_config.json"):
                result = verify_adapter(folder)
            else:
                raise CheckpointError(
                    f"verifying {folder}",
                    found="no config.json, no adapter_config.json and no .onnx file",
                    do="Name a folder that sparsify wrote, or any checkpoint",
                )
        if as_json:
            say(json.dumps(result.as_dict()))
        elif not (quiet and result.sound):
            Terminal().print(verification_report(result))
        if not result.sound:
            raise SystemExit(1)
