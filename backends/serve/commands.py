"""``sparsify serve``. Imports nothing heavy."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.options import AsJson, Debug, Device, LogLevel, NoCheck, Quiet, Trust, command_errors
from sparsify.cli.terminal import say
from sparsify.errors import SpecError

# What a shell makes of Ctrl-C and SIGTERM.
_INTERRUPTED, _TERMINATED = 130, 143


def serve(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of a language model: ordinary, pruned, packed, of ragged widths.", metavar="OUT"),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What requests call the model. [default: the folder's name]")] = None,
    threads: Annotated[int, typer.Option(help="0: as many as torch takes.", min=0)] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
    no_check: NoCheck = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
) -> None:
    """Serve OUT over HTTP as OpenAI's API: completions and chat, streamed or whole. Needs the extra `serve`."""
    with command_errors(debug, log_level):
        from sparsify.backends.serve.needed import require_server
        from sparsify.words import check_threads

        talks = not as_json and not quiet
        require_server()
        check_threads(threads)
        name = folder.resolve().name if name is None else name
        if not name.strip() or not name.isprintable():
            raise SpecError(f"--name {name!r}", found="nothing that a request can name", do="Write a word")

        import torch

        from sparsify.backends.serve.opening import check_servable, example, open_held
        from sparsify.backends.serve.server import address_of, bind, listen, run_until_told
        from sparsify.host import resolve_device

        kind = check_servable(folder)
        where = resolve_device(device)
        if threads:
            torch.set_num_threads(threads)
        with bind(host, port) as socket:
            if talks:
                say(f"loading {folder} ({kind})", flush=True)
            held = open_held(folder, name, where, trust_remote_code=trust_remote_code, check=not no_check)
            listen(socket)
            address = address_of(socket)
            if as_json:
                told = {"address": address, "model": name, "folder": str(folder), "process": os.getpid()}
                say(json.dumps(told), flush=True)
            elif talks:
                kept = str(held.model.dtype).removeprefix("torch.")
                say(f"serving {name} ({type(held.model).__name__}, {kept}, {where}) at {address}", flush=True)
                say(f"  {example(held, address)}", flush=True)
                say("Ctrl-C ends it.", flush=True)
            # Requests are told on --log-level info; uvicorn's own story, with its tracebacks of answers that a stop cut
            # short, on debug. What fails in an answer we log ourselves.
            story = log_level.lower() in ("info", "debug")
            logging.getLogger("uvicorn").setLevel("INFO" if log_level.lower() == "debug" else "CRITICAL")
            logging.getLogger("uvicorn.access").setLevel("INFO" if story else "CRITICAL")
            # A process that was started to ignore Ctrl-C (a job of a script) ends without an exception.
            code = 0
            try:
                run_until_told(held, socket, log_requests=story)
            except KeyboardInterrupt:
                code = _INTERRUPTED
            except SystemExit:
                code = _TERMINATED
        if talks:
            say("stopped", flush=True)
        raise typer.Exit(code)
