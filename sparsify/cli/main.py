"""The command line: every command in the registry.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import gc
import inspect
import sys
import warnings
from typing import Annotated, Any

import typer

from sparsify.cli.group import Commands, at_home
from sparsify.cli.terminal import complain, patient_streams
from sparsify.errors import first_line
from sparsify.method.registry import is_own, loaded, package_of, registered, warn_of
from sparsify.words import plain

# New objects after which the interpreter looks for cycles among them.
_SEARCHED_AT = 10_000

app = typer.Typer(
    cls=Commands,
    help="Prune large language models after training, and write them sparse.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Boxes and markup cost as much as all else that help does.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("sparsify-fx"))
        raise typer.Exit


@app.callback()
def root(
    # A callback of the option's own runs before typer misses a command.
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options that stand before any command."""


def main() -> None:
    """The command line of this process."""
    # What is imported makes half a million objects, all of which stay: to search through them at every 700 of them, as
    # is usual, is a tenth of what a short command takes.
    gc.set_threshold(_SEARCHED_AT)
    patient_streams()
    warnings.formatwarning = _warning
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        # One command is not kept waiting by the others; where it is none of them, all are there to be named.
        application(asked if asked in registered("sparsify.commands") else None)()
    except KeyboardInterrupt:
        complain("interrupted; nothing was written")
        raise SystemExit(130) from None


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A sentence for people; what it holds of names and other libraries' words is shown as it is."""
    return f"warning: {plain(str(message), keep=chr(10))}\n"


def _in_short(function: Any) -> str:
    """What the list of commands says: the first clause of what the command's own help says."""
    first = (inspect.getdoc(function) or "").partition("\n")[0]
    return first.rstrip(".").partition(": ")[0].partition("; ")[0]


def application(only: str | None = None) -> typer.Typer:
    """Every command that is registered, or ``only`` one: the core's own, and those that backends and other packages
    bring."""
    known = {command.name for command in app.registered_commands}
    for name, entry, function in loaded("sparsify.commands", only):
        if name in known:
            continue
        if is_own(entry):
            app.command(name, short_help=_in_short(function))(at_home(function))
            continue
        try:
            trial = typer.Typer(add_completion=False)
            trial.command(name)(function)
            typer.main.get_command(trial)
            text = plain(inspect.getdoc(function) or "", keep="\n")
        except Exception as error:  # what is no function, or has arguments that are none of typer's
            warn_of(entry, f"{package_of(entry)} brings no command ({type(error).__name__}: {first_line(error)})")
            continue
        app.command(name, help=text)(at_home(function))
    return app
