"""The command line: every command in the registry.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from sparsify.method.registry import registered

app = typer.Typer(
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
    application()()


def application() -> typer.Typer:
    """Every command that is registered: the core's own, and those that backends and other packages bring."""
    known = {command.name for command in app.registered_commands}
    for name, entry in registered("sparsify.commands").items():
        if name not in known:
            app.command(name)(entry.load())
    return app
