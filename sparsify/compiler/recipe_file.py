"""A recipe: the words of a compile in a file, YAML or the ``sparsify.json`` of a folder that a compile wrote.

Its keys are the options of ``sparsify compile`` with _ for -, and ``model``, ``passes`` and ``output``. Of YAML what
:func:`yaml.safe_load` reads, and no more: no tag makes an object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError, SpecError, first_line, near
from sparsify.files.manifest import MANIFEST
from sparsify.files.reading import kind_at
from sparsify.files.single import check_file, put_file

# The first line of a recipe that was saved, by which it is told from what else is called so.
_HEADER = "# sparsify compile --recipe FILE; see docs/recipes.md"

# Key to the types of its value, and what these are called. What a machine has (device, memory) may stand there too.
_TEXT, _NUMBER, _SWITCH = ((str,), "text"), ((int,), "a whole number"), ((bool,), "true or false")
_NAMES = ((str, list), "a name or a list of names")
KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("model", "output", "to", "calibration", "schedule", "device", "memory", "compute_dtype"), _TEXT),
    **dict.fromkeys(("chat_template", "adapter", "dtype", "teacher", "eval"), _TEXT),
    **dict.fromkeys(("samples", "sequence_length", "seed", "eval_windows"), _NUMBER),
    **dict.fromkeys(("ignore", "only", "print_after"), _NAMES),
    **dict.fromkeys(("overwrite", "dry_run", "allow_bin", "no_check", "allow_nan", "strict", "no_journal"), _SWITCH),
    "passes": ((str, list), "a list of passes"),
}
_OF_A_PASS = {"pass": _TEXT, "only": _NAMES, "ignore": _NAMES}
_NOT_HERE = {
    "trust_remote_code": "code of others is trusted on the command line alone: --trust-remote-code",
    "processes": "how many processes share the work is a matter of the machine: give --processes on the command line",
    "checkpoint_every": "how much is kept for --resume is a matter of the disk: give --checkpoint-every on the command "
    "line",
    "resume": "that a run was interrupted is no matter of a recipe: give --resume on the command line",
}
_MOST = 1 << 20


def read_recipe(path: Path) -> dict[str, Any]:
    """The words of the recipe at ``path``: a YAML file, a ``sparsify.json``, or the folder that one lies in.

    Raises:
        CheckpointError: no such file, or one that cannot be read. SpecError: a key that there is not (line and near
            name), or a value of another type.
    """
    place = path / MANIFEST if path.is_dir() else path
    try:
        if place.name != MANIFEST and place.stat().st_size > _MOST:
            raise SpecError(f"recipe {path}", found="more than a megabyte", do="Name a recipe, or a sparsify.json")
        text = place.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        found = "no such file" if path == place else f"a folder without {MANIFEST}"
        do = "Check the path" if path == place else "Name a folder that sparsify compile wrote"
        raise CheckpointError(f"recipe {path}", found=found, do=do) from error
    except (OSError, ValueError) as error:
        do = "Check the path" if path == place else "Name a folder that sparsify compile wrote"
        raise CheckpointError(f"recipe {path}", found=f"cannot be read ({error})", do=do) from error
    if place.name == MANIFEST:
        return _of_manifest(place, text)
    return _of_yaml(path, text)


def write_recipe(words: Mapping[str, Any]) -> bytes:
    """The recipe of ``words`` as YAML."""
    import yaml

    text: str = yaml.safe_dump(dict(words), sort_keys=False, allow_unicode=True, width=120)
    return f"{_HEADER}\n{text}".encode()


def save_recipe(path: Path, words: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write ``words`` to ``path``, by :func:`write_recipe`.

    Raises:
        BackendError: a file that is no recipe of ours is there, or another recipe and not ``overwrite``.
    """
    content = write_recipe(words)
    # The same command again, to go on with --resume say, writes the same.
    same = kind_at(path) == "file" and path.stat().st_size == len(content) and path.read_bytes() == content
    if not same:
        made_by = "sparsify compile --save-recipe"
        check_file(path, "recipe", (_HEADER,), made_by, overwrite=overwrite, option="--save-recipe")
        put_file(path, content)


def _of_manifest(place: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"recipe {place}", found=f"no JSON ({first_line(error)})", do="Write it again") from error
    words = content.get("recipe") if isinstance(content, dict) else None
    if not isinstance(words, dict):
        raise SpecError(
            f"recipe {place}",
            found="no 'recipe' in it: tuned, made from Python with data in memory, or before recipes were kept",
            do="Give the options on the command line; its 'history' says which",
        )
    for key, value in words.items():
        _check(f"recipe {place}", key, value, KEYS)
    return words


def _of_yaml(path: Path, text: str) -> dict[str, Any]:
    import yaml

    asked = f"recipe {path}"
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        words = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        found = f"no YAML{where} ({getattr(error, 'problem', None) or first_line(error)})"
        raise SpecError(asked, found=found, do="Mend it; docs/recipes.md has an example") from error
    if not isinstance(words, dict) or not isinstance(node, yaml.MappingNode):
        raise SpecError(asked, found="no keys with values", do="Begin with passes: [wanda:2:4], say")
    _check_mapping(asked, node, words, KEYS)
    if isinstance(words.get("passes"), list):
        nodes = next(value.value for key, value in node.value if key.value == "passes")
        for inner, own in zip(nodes, words["passes"], strict=True):
            if isinstance(own, dict):
                _check_mapping(asked, inner, own, _OF_A_PASS)
                if "pass" not in own:
                    raise _refused(asked, inner, "no 'pass' beside the names", "Add pass: wanda:2:4, say")
            elif not isinstance(own, str):
                raise _refused(asked, inner, f"{own!r} is no pass", "Write a spec: wanda:2:4")
    return words


def _check_mapping(asked: str, node: Any, words: Mapping[Any, Any], keys: Mapping[str, Any]) -> None:
    """Every key and value of one mapping of the YAML, with the line of what is wrong."""
    seen: set[str] = set()
    for key, value in node.value:
        where = f"{asked}, line {key.start_mark.line + 1}"
        if key.value in seen:
            raise SpecError(where, found=f"'{key.value}' a second time", do="Give it once")
        seen.add(key.value)
        _check(where, key.value, words.get(key.value, value.value), keys)


def _check(where: str, key: str, value: Any, keys: Mapping[str, tuple[tuple[type, ...], str]]) -> None:
    if key in _NOT_HERE:
        raise SpecError(where, found=f"'{key}' in a file", do=_NOT_HERE[key].capitalize())
    if key not in keys:
        raise SpecError(where, found=f"no such key, '{key}'", do=near(key, keys))
    kinds, called = keys[key]
    right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if isinstance(value, list) and key != "passes":
        right = right and all(isinstance(each, str) for each in value)
    if not right:
        raise SpecError(where, found=f"{key} is {value!r}", do=f"Give {called}")


def _refused(asked: str, node: Any, found: str, do: str) -> SpecError:
    return SpecError(f"{asked}, line {node.start_mark.line + 1}", found=found, do=do)
