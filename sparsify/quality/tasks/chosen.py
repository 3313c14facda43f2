"""The tasks that were meant, by name, by a file or by a folder of files, with their data: what lm-eval then asks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsify.context import Progress, report
from sparsify.errors import CalibrationError, SpecError, first_line, near
from sparsify.files.reading import kind_at
from sparsify.host import quiet
from sparsify.quality.tasks.hushed import hushed
from sparsify.quality.tasks.names import SUITES, split_tasks

_YAML = (".yaml", ".yml")
# The seeds that lm-eval itself takes by default: of Python, and of numpy, torch and the examples.
_SEED, _OTHER_SEED = 0, 1234
# Loggers of what tasks are made with.
LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "evaluate", "fsspec", "httpx")


@dataclass(frozen=True)
class Chosen:
    """Tasks with their data, each asked of one model after the other.

    Attributes:
        words: as they were given. tasks: lm-eval's own, by name. groups: its groups of them, by name.
        suites: names of tasks by the name of the set of ours that they were asked for by.
    """

    words: tuple[str, ...]
    tasks: dict[str, Any] = field(repr=False)
    groups: dict[str, Any] = field(repr=False)
    suites: dict[str, tuple[str, ...]]

    @property
    def generating(self) -> list[str]:
        """Tasks for which a model must write text."""
        return [name for name, task in self.tasks.items() if task.OUTPUT_TYPE == "generate_until"]

    def loaded(self) -> dict[str, Any]:
        """As lm-eval's ``evaluate`` takes them."""
        return {"tasks": dict(self.tasks), "groups": dict(self.groups)}


@dataclass(frozen=True)
class Named:
    """Tasks that exist, whose data were not asked for yet.

    Attributes:
        specs: names and files for lm-eval. manager: of lm-eval, which knows them.
    """

    words: tuple[str, ...]
    specs: tuple[str, ...]
    suites: dict[str, tuple[str, ...]]
    manager: Any = field(repr=False)
    _loaded: dict[int | None, Chosen] = field(default_factory=dict, repr=False)

    def load(self, num_fewshot: int | None = None) -> Chosen:
        """The tasks with their data, which are read once.

        Args:
            num_fewshot: examples before each question, where a task does not insist on none; None: as tasks say.

        Raises:
            CalibrationError: data that cannot be had. SpecError: a task that cannot be run, or one twice.
        """
        if num_fewshot in self._loaded:
            return self._loaded[num_fewshot]
        tasks: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        with quiet(*LOGGERS), hushed(), seeded():
            for number, spec in enumerate(self.specs):
                report(Progress("loading tasks", number, len(self.specs), spec))
                found = self._load(spec)
                if twice := sorted(found["tasks"].keys() & tasks.keys()):
                    raise SpecError(f"task '{twice[0]}'", found=f"it is in '{spec}' once more", do="Name it once")
                tasks |= found["tasks"]
                groups |= found["groups"]
            report(Progress("loading tasks", len(self.specs), len(self.specs)))
            for name, task in tasks.items():
                _check(name, task)
                _set_examples(task, num_fewshot)
                _check_examples(name, task)
        return self._loaded.setdefault(num_fewshot, Chosen(self.words, tasks, groups, self.suites))

    def _load(self, spec: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self.manager.load([spec])
            for task in found["tasks"].values():
                len(task.eval_docs)
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # whatever datasets, the hub and a task's own code raise
            if is_observers(error):
                raise
            raise _no_data(spec, error) from error
        return found


def named(tasks: str | Path | Sequence[str | Path] | Named, include: Sequence[str | Path] = ()) -> Named:
    """What is meant: names of sets of ours, of lm-eval's tasks and groups, YAML files, folders of them.

    Args:
        tasks: one, several, or a text with commas between; what this gave before stays as it is.
        include: folders of YAML files whose tasks may be named as well.

    Raises:
        SpecError: a name that nothing has, with those that are near; a file that is none or describes no task.
    """
    if isinstance(tasks, Named):
        return tasks
    words = split_tasks(tasks)
    for folder in include:
        if kind_at(folder) != "folder":
            raise SpecError(f"--include {folder}", found="no such folder", do="Name a folder of tasks (*.yaml)")
    report(Progress("looking up tasks"))
    with quiet(*LOGGERS):
        files = {word: _files(word) for word in words if _is_path(word)}
        suites = {word: SUITES[word] for word in words if word in SUITES}
        specs: list[str] = []
        for word in words:
            # lm-eval loads a group by its name alone.
            own = [_content(file)["group"] if _is_group(file) else str(file) for file in files.get(word, ())]
            specs += own or suites.get(word, (word,))
        specs = list(dict.fromkeys(specs))
        places = [Path(folder).expanduser().absolute() for folder in include]
        places += [file.parent for found in files.values() for file in found if _is_group(file)]
        manager = _manager(specs, list(dict.fromkeys(places)))
        for spec in specs:
            if not _is_path(spec):
                _check_known(spec, manager)
    return Named(tuple(words), tuple(specs), suites, manager)


@contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's own seeds meanwhile: some tasks draw when they are made, and some models when they answer. Whoever
    drew before goes on as if nothing had been."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(_SEED)
        np.random.seed(_OTHER_SEED)
        torch.manual_seed(_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _manager(specs: Sequence[str], include: Sequence[Path]) -> Any:
    """lm-eval's manager of tasks; it reads its own fourteen thousand files only for what lies in no other."""
    from lm_eval.tasks import TaskManager

    here = TaskManager(include_defaults=False, include_path=list(include) or None)

    def known(spec: Any) -> bool:
        if not isinstance(spec, str) or spec not in here.task_index:
            return isinstance(spec, str) and _is_path(spec)
        members = (here.task_index[spec].cfg or {}).get("task")
        return all(map(known, members)) if isinstance(members, list) else True

    if all(map(known, specs)):
        return here
    return TaskManager(include_path=list(include)) if include else _builtin()


@cache
def _builtin() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _is_path(word: str) -> bool:
    """Of a plain word that a task has too, and a folder here, the task is meant."""
    return word.lower().endswith(_YAML) or "/" in word or word.startswith((".", "~"))


def _files(word: str) -> list[Path]:
    """The file that ``word`` names, or the files of tasks in the folder that it names."""
    path, kind = Path(word).expanduser().absolute(), kind_at(word)
    if kind == "folder":
        found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in _YAML and _kind(file) == "task"]
        if not found:
            raise SpecError(f"tasks in {word}", found="no file that describes a task", do="Name a folder of *.yaml")
        return found
    if kind != "file":
        raise SpecError(f"task {word}", found="no such file or folder", do="Check the path")
    if _kind(path) is None:
        raise SpecError(f"task {word}", found="neither a task nor a group in it", do="It needs task: or group: NAME")
    return [path]


def _is_group(file: Path) -> bool:
    return _kind(file) == "group"


def _kind(file: Path) -> str | None:
    """What a YAML file describes: a ``task``, a ``group``, or nothing (what others include)."""
    content = _content(file)
    if isinstance(content.get("group"), str):
        return "group"
    return "task" if isinstance(content.get("task"), str) else None


def _content(file: Path) -> dict[str, Any]:
    """Raises:
    SpecError: no YAML.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        content: dict[str, Any] = load_yaml(file, resolve_func=False)
    except Exception as error:  # of yaml, of files, of what is included
        raise SpecError(f"task {file}", found=f"no task's YAML ({first_line(error)})", do="Mend it") from error
    return content


def _check_known(name: str, manager: Any) -> None:
    if name not in manager.task_index:
        known = [*manager.task_index, *SUITES]
        raise SpecError(f"task '{name}'", found="nothing of that name in lm-eval or --include", do=near(name, known))


def _check(name: str, task: Any) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise SpecError(f"task '{name}'", found="questions about images or sound", do="Take tasks of text")
    if getattr(task, "UNSAFE_CODE", False):
        raise SpecError(
            f"task '{name}'",
            found="a task that runs the code which the model writes",
            do="Run it in a sandbox, with python -m sparsify.lm_eval … --confirm_run_unsafe_code",
        )


def _set_examples(task: Any, asked: int | None) -> None:
    """As lm-eval's ``simple_evaluate`` does: a task that says 0 means it."""
    own = task.get_config("num_fewshot")
    if asked is not None and own != 0:
        task.set_config(key="num_fewshot", value=asked)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_OTHER_SEED)


def _check_examples(name: str, task: Any) -> None:
    """As many examples are drawn as are asked for, and one more where the question itself may be among them."""
    asked, drawn = task.get_config("num_fewshot"), getattr(task, "fewshot_cfg", None)
    if not asked or drawn is None:
        return
    own = int(drawn.split == task.get_config("test_split"))
    if (known := len(list(task.fewshot_docs()))) < asked + own:
        beside = ", the question among them" if own else ""
        raise SpecError(
            f"task '{name}' with {asked} examples before each question",
            found=f"{known} documents to draw them from{beside}",
            do=f"Give --num-fewshot {max(0, known - own)} or fewer",
        )


def is_observers(error: BaseException) -> bool:
    """Whether it was raised by whoever is told of progress: that ends the work, and is nobody else's fault."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is report.__code__:
            return True
        trace = trace.tb_next
    return False


def _no_data(spec: str, error: Exception) -> CalibrationError:
    """Which file or host did not give the data, as far as the libraries say."""
    said = first_line(error)
    lost = isinstance(error, (ConnectionError, TimeoutError)) or "Hub" in said or "Offline" in type(error).__name__
    found = f"its data cannot be had ({said})"
    if lost:
        do = "It needs the network (huggingface.co), or the data set in the cache of an earlier run"
    elif isinstance(error, FileNotFoundError) or "Unable to find" in said:
        do = "Paths in a task's file count from where the command runs; mend data_files in it"
    else:
        found, do = f"it cannot be made of its data ({said})", "Mend the task's file, or its data"
    return CalibrationError(f"task '{spec}'", found=found, do=do)
