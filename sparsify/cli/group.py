"""The group of commands: complaints about the words of a command line, and near names across commands."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from sparsify.errors import near
from sparsify.words import plain

# What other tools call what ours do, and what we do not.
_MEANT = {
    **dict.fromkeys(("prune", "sparsify", "oneshot", "compress"), "compile"),
    **dict.fromkeys(("export", "convert"), "compile MODEL --to onnx"),
    **dict.fromkeys(("evaluate", "perplexity", "ppl", "lm-eval"), "eval"),
    **dict.fromkeys(("finetune", "fine-tune", "train", "recover", "distill", "lora"), "tune"),
    **dict.fromkeys(("server", "deploy", "api"), "serve"),
    **dict.fromkeys(("generate", "chat", "infer"), "run"),
    **dict.fromkeys(("check", "validate"), "verify"),
    **dict.fromkeys(("benchmark", "measure", "speed"), "bench"),
    **dict.fromkeys(("methods", "list", "options"), "passes"),
    **dict.fromkeys(("show", "info", "graph"), "inspect"),
    "dequantize": "unpack",
    **dict.fromkeys(("page", "html", "summary"), "report"),
    "difference": "diff",
}
_QUANTISE = "sparsify prunes, and reads models that are quantized already; quantise its output with another tool."
_NOT_OURS = {
    "quantize": _QUANTISE,
    "quantise": _QUANTISE,
    "help": "Write sparsify --help, or sparsify COMMAND --help.",
}
# Words of commands that may name a file or folder of the user's.
_PLACES = frozenset({"model", "models", "data", "calibration", "validation", "teacher", "against", "a", "b"})


class Commands(TyperGroup):
    """typer's group, whose complaints about the words of a command line show control characters escaped."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _plainly():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _plainly():
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for option in self.get_params(ctx):
            # typer's own flags (help, completion) are None by default, which takes pydantic to read: a third of the
            # time that help takes.
            if getattr(option, "is_flag", False) and option.default is None:
                option.default = False
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            ctx.fail(f"No such command '{name}'. {did_you_mean(name, self.commands)}")
        known, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            within = command.context_class(command, info_name=name, parent=ctx)
            if (twice := _given_twice(within, command, list(rest))) is not None:
                within.fail(f"{twice} is given more than once, and only the last would count. Give it once.")
        return known, command, rest


def _given_twice(ctx: Any, command: Any, words: list[str]) -> str | None:
    """An option that takes one value and is given several times, of which all but the last would be passed over."""
    try:
        _, _, order = command.make_parser(ctx).parse_args(words)
    except Exception as error:
        # Said in full where they are read again.
        if hasattr(error, "format_message"):
            return None
        raise
    for place, option in enumerate(order):
        valued = not getattr(option, "is_flag", True) and not option.multiple
        if valued and any(option is earlier for earlier in order[:place]):
            return str(max(option.opts, key=len))
    return None


def did_you_mean(name: str, commands: Any) -> str:
    """What to write in the place of a command that there is not."""
    if (said := _NOT_OURS.get(name.lower())) is not None:
        return said
    meant = _MEANT.get(name.lower())
    return f"{near(name, commands)}." if meant is None else f"Did you mean 'sparsify {meant}'?"


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # typer's own kinds of error are not importable by name.
        if hasattr(error, "format_message"):
            error.message = plain(str(getattr(error, "message", "")))  # type: ignore[attr-defined]
        raise


def at_home(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with every ~ at the beginning of a path expanded, which shells do not in ``--output=~/OUT``; paths
    are whole, so that messages name them in full."""

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        command(*args, **{name: _expanded(name, value) for name, value in given.items()})

    return run


def _expanded(name: str, value: Any) -> Any:
    if isinstance(value, Path):
        return value.expanduser().absolute()
    if isinstance(value, list) and name in _PLACES:
        return [_expanded(name, each) for each in value]
    if isinstance(value, str) and name in _PLACES and value.startswith("~"):
        return str(Path(value).expanduser())
    return value
