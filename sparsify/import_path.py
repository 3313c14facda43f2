"""Where this process and those that it starts look for modules: never in the working directory.

That may be a folder that was downloaded, and a ``json.py`` in it is no part of any model. Imports nothing but what
Python has loaded when it starts: until this has run, an import may find such a file.
"""

import os
import sys


def leave_working_directory() -> None:
    """Take it off this process's import path, where it is because of ``python -m`` or of an empty word in PYTHONPATH.

    Who names it in PYTHONPATH asks for it, and keeps it.
    """
    try:
        here = os.getcwd()  # noqa: PTH109 (pathlib is not loaded yet)
    except OSError:
        here = ""
    words = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = any(word and os.path.abspath(word) == here for word in words)  # noqa: PTH100
    # Python puts it first for -m, unless it is told not to (-P, -I).
    safe = sys.flags.isolated or getattr(sys.flags, "safe_path", False)
    if sys.path[:1] == [here] and not safe and by_module():
        del sys.path[0]
    if "" in words[:-1] + words[1:] and not named and not sys.flags.ignore_environment and here in sys.path:
        sys.path.remove(here)
    sys.path[:] = [place for place in sys.path if place]


def by_module() -> bool:
    """Whether this process is ``python -m sparsify``, also while that is still being loaded."""
    # What Python was called with is its own words, the module's and, as in sys.argv, the rest.
    word = sys.orig_argv[-len(sys.argv)] if len(sys.argv) < len(sys.orig_argv) else ""
    return word == "sparsify" or (word.startswith("-") and word.endswith("msparsify"))


def python(module: str) -> list[str]:
    """The words that call ``main`` of ``module`` in a process of its own; further ones are its arguments."""
    # -m would put the working directory first, and what hinders that (-P) is not in Python 3.10. With -c it is "".
    start = f"import sys; sys.path[:] = filter(None, sys.path); from {module} import main; main()"
    return [sys.executable, "-c", start]


def environment() -> dict[str, str]:
    """This process's, for one that it starts: empty words of PYTHONPATH and PATH mean the working directory."""
    changed = dict(os.environ)
    for name in ("PATH", "PYTHONPATH"):
        words = [word for word in changed.get(name, "").split(os.pathsep) if word]
        if words:
            changed[name] = os.pathsep.join(words)
        else:
            changed.pop(name, None)
    return changed
