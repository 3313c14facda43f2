"""How a process that is nothing but one command ends: without taking itself apart first."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable


def at_once(command: Callable[[], None]) -> None:
    """Run ``command``, after which this process ends as soon as all that it registered for its end has run.

    Python would look through every object for cycles, several times, and destroy module by module what the system takes
    back anyway: with torch and transformers loaded that is a second of each command. Threads have ended and what
    was printed is written. Whoever traces or profiles the process, or registered for its end before (a
    ``sitecustomize``), finds it as it always is.
    """
    code = 1

    def leave() -> None:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            return  # told, and its exit code given, as Python does it
        os._exit(code)

    # Registered before anything that a command loads, so it runs after all of that. How many there are is no public
    # question; a Python that does not answer it ends as it always does.
    earlier = getattr(atexit, "_ncallbacks", lambda: 1)()
    if not earlier and sys.gettrace() is None and sys.getprofile() is None:
        atexit.register(leave)
    try:
        command()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
