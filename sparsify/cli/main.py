"""The command line: every command in the registry.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from sparsify.cli.terminal import complain, replace_what_cannot_be_written
from sparsify.errors import first_line
from sparsify.method.registry import is_own, loaded, package_of, warn_of
from sparsify.words import plain


class Commands(TyperGroup):
    """typer's group, whose complaints about the words of a command line show control characters escaped."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _plainly():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _plainly():
            return super().invoke(ctx)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # typer's own kinds of error are not importable by name.
        if hasattr(error, "format_message"):
            error.message = plain(str(getattr(error, "message", "")))  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    cls=Commands,
    help="Prune large language models after training, and write them sparse.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
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
    replace_what_cannot_be_written()
    warnings.formatwarning = _warning
    try:
        application()()
    except KeyboardInterrupt:
        complain("interrupted; nothing was written")
        raise SystemExit(130) from None


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A sentence for people; what it holds of names and other libraries' words is shown as it is."""
    return f"warning: {plain(str(message), keep=chr(10))}\n"


def application() -> typer.Typer:
    """Every command that is registered: the core's own, and those that backends and other packages bring."""
    known = {command.name for command in app.registered_commands}
    for name, entry, function in loaded("sparsify.commands"):
        if name in known:
            continue
        if is_own(entry):
            app.command(name)(function)
            continue
        try:
            trial = typer.Typer(add_completion=False)
            trial.command(name)(function)
            typer.main.get_command(trial)
            # Nor is its text read as markup, which may be wrong.
            text = escape(plain(inspect.getdoc(function) or "", keep="\n"))
        except Exception as error:  # what is no function, or has arguments that are none of typer's
            warn_of(entry, f"{package_of(entry)} brings no command ({type(error).__name__}: {first_line(error)})")
            continue
        app.command(name, help=text)(function)
    return app
