"""What commands share: their options, and errors as sentences. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TextIO

import typer

from sparsify.cli.terminal import complain
from sparsify.errors import SparsifyError, SpecError, first_line
from sparsify.words import plain
from sparsify.world.joining import join, size_told
from sparsify.world.world import World

Model = Annotated[str, typer.Argument(help="Hugging Face folder, hub id or GGUF file.", metavar="MODEL")]
AllowBin = Annotated[bool, typer.Option("--allow-bin", help="Read pytorch_model.bin (weights only, no code).")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings along.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not hold a folder's bytes against its sparsify.json.")]
AllowNan = Annotated[
    bool,
    typer.Option("--allow-nan", help="Let NaN and infinity pass in tensors; in a weight to prune they never do."),
]
Compute = Annotated[
    str | None,
    typer.Option(
        "--compute-dtype",
        help="float32, bfloat16 or float16: what the model runs in. [default: its own]",
        metavar="DTYPE",
    ),
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(
        "--chat-template", help="Jinja template for chat messages. [default: the tokenizer's]", metavar="FILE"
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse tensors that the model's class does not know; else they are carried.")
]
AdapterWord = Annotated[
    str | None,
    typer.Option("--adapter", help="merge: add a LoRA adapter to the weights. [default: refuse one]", metavar="WORD"),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16: what a quantized model's weights are read and written in. "
        "[default: bfloat16]",
        metavar="DTYPE",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="Leave these dense: names, globs, re:…; repeated or with commas.", metavar="NAMES"),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="Prune only these: names, globs, re:…; repeated or with commas.", metavar="NAMES"),
]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences. [default: 128; 32 for self]")]
Seed = Annotated[int, typer.Option(help="Seed for drawing sequences.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT: an older output or a model, no other folder.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Length = Annotated[int | None, typer.Option(help="Tokens per sequence. [default: min(2048, the model's context)]")]
Memory = Annotated[str, typer.Option(help="Memory for activations; past it they go to a file.", metavar="SIZE")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Processes = Annotated[
    int | None,
    typer.Option("--processes", help="Share the work out among so many processes here.", min=2, metavar="N"),
]

# What every command that several processes share imports.
_SHARED = (
    "sparsify.compiler.pipeline",
    "sparsify.quality.evaluation",
    "torch.export._trace",
    "transformers.masking_utils",
    "transformers.modeling_layers",
)
# What a shell makes of SIGTERM.
_TERMINATED = 143


@contextlib.contextmanager
def command_errors(debug: bool, log_level: str) -> Iterator[None]:
    """Errors as sentences with the right exit code; a terminated process cleans up like an interrupted one."""
    _set_logging(log_level)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        yield
    except (typer.Exit, SystemExit, BrokenPipeError) as error:
        if isinstance(error, SystemExit) and error.code == _TERMINATED:
            complain("terminated; nothing was written")
        # Whoever read the output has seen enough: typer ends the process quietly.
        raise
    except KeyboardInterrupt:
        complain("interrupted; nothing was written")
        raise SystemExit(130) from None
    except SparsifyError as error:
        if debug:
            raise
        complain(str(error))
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            complain("printing or a temporary file: no space left there. Send the output elsewhere, or make space")
            raise SystemExit(1) from None
        complain(f"unexpected {type(error).__name__}: {first_line(error)} (run again with --debug for the traceback)")
        raise SystemExit(1) from None


def launched(processes: int | None) -> bool:
    """Whether so many processes were asked for: this command has then been run by them, and they are done.

    Raises:
        SpecError: by one of several that ``torchrun`` started. ProcessError, SystemExit: one of them failed.
    """
    if processes is None:
        return False
    from sparsify.cli.main import main
    from sparsify.world.launch import launch

    if size_told() > 1:
        raise SpecError(
            f"--processes {processes}",
            found="processes that torchrun has started already",
            do="Leave --processes out: this is one of them",
        )
    launch(processes, _of_one_process(sys.argv[1:]), main, _SHARED)
    return True


@contextlib.contextmanager
def joined(device: str) -> Iterator[tuple[World, str]]:
    """The world of this process, and the device that is its own; of several the first says what went wrong, the others
    that it does.
    """
    from sparsify.host import resolve_device

    with join(resolve_device(device).type if size_told() > 1 else "cpu") as world, _one_voice(world):
        yield world, str(world.device) if world.device is not None and world.device.type == "cuda" else device


@contextlib.contextmanager
def _one_voice(world: World) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and world.divided:
            complain(f"process {world.rank} of {world.size}, {world.doing}: ended, because another process was")
        if isinstance(error, SystemExit) or not world.hushed(error):
            raise
        complain(f"process {world.rank} of {world.size} ended; process 0 says why")
        raise SystemExit(error.exit_code if isinstance(error, SparsifyError) else 1) from None


def _of_one_process(words: list[str]) -> list[str]:
    """The words of the command line without ``--processes N``."""
    found, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == "--processes":
            skip = True
        elif not word.startswith("--processes="):
            found.append(word)
    return found


class _Plain(logging.Formatter):
    """What libraries log holds names from files."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record), keep="\n\t")


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever the standard error is at the time: a progress line puts itself in its place."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        pass


def _set_logging(level: str) -> None:
    """``info`` is our own story; what other libraries tell of theirs comes with ``debug``."""
    number = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}.get(level.upper())
    if number is None:
        complain(f"log level '{level}': no such level. Choose debug, info, warning or error")
        raise SystemExit(2)
    debugging = number < logging.INFO
    # Read by transformers and the hub when they are first imported; a user's own setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "debug" if debugging else "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "debug" if debugging else "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    handler = _Stderr()
    handler.setFormatter(_Plain("%(message)s" if number == logging.INFO else logging.BASIC_FORMAT))
    logging.basicConfig(level=number if debugging else max(number, logging.WARNING), handlers=[handler])
    logging.getLogger("sparsify").setLevel(number)
    if not debugging:
        # What the hub's client and its transport say of their retries is not about the user's command.
        for name in ("huggingface_hub", "datasets", "httpx", "transformers", "torch", "bitsandbytes", "lm_eval"):
            logging.getLogger(name).setLevel(logging.ERROR)
