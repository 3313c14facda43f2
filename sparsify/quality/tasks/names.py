"""Names of tasks as users write them. Imports nothing heavy: wrong words are told before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from sparsify.errors import SpecError

# Sets of tasks that have a name of their own here, whose mean is printed as papers print it: plain accuracy (acc), each
# task counted once. The seven are those that Wanda, and SparseGPT beside it, are judged by.
SUITES: dict[str, tuple[str, ...]] = {
    "wanda7": ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}
SUITE_METRIC = "acc"


def split_tasks(given: str | Path | Iterable[str | Path]) -> list[str]:
    """Tasks with commas between, or several such texts, as a list without repetitions.

    Raises:
        SpecError: no task among them.
    """
    if not isinstance(given, str | Path | Iterable):
        raise SpecError(f"tasks {given!r}", found=type(given).__name__, do="Name some: boolq,rte, wanda7")
    texts = [given] if isinstance(given, (str, Path)) else list(given)
    words = list(dict.fromkeys(word.strip() for text in texts for word in str(text).split(",") if word.strip()))
    if not words:
        raise SpecError("tasks", found="no name among them", do="Name some: boolq,rte, wanda7, or a file my_task.yaml")
    return words


def check_asked(
    tasks: object, num_fewshot: int | None, include: bool, limit: int | None = None, batch_size: int = 1
) -> None:
    """Words about tasks and pictures, before anything is loaded.

    Raises:
        SpecError: words for tasks and no tasks, an amount that is none, or lm-eval is missing.
    """
    for name, given in (("--num-fewshot", num_fewshot is not None), ("--include", include)):
        if given and tasks is None:
            raise SpecError(name, found="no task that it could be meant for", do="Give --tasks boolq, say")
    for name, amount, least in (("num-fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch-size", batch_size, 1)):
        if amount is not None and not isinstance(amount, int):
            raise SpecError(f"--{name} {amount}", found=f"{type(amount).__name__}, no whole number", do="Give 8, say")
        if amount is not None and amount < least:
            raise SpecError(f"--{name} {amount}", found=f"fewer than {least}", do=f"Give {least} or more")
    if tasks is not None:
        require_lm_eval()


def require_lm_eval() -> None:
    """Raises:
    SpecError: lm-eval, or what it runs models with, is not installed.
    """
    for module, package in (("lm_eval", "lm-eval"), ("accelerate", "accelerate")):
        if find_spec(module) is None:
            raise SpecError("tasks", found=f"{package} is not installed", do="pip install 'sparsify-fx[eval]'")
