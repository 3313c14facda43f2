"""Where the processes of ``--processes`` come from."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from sparsify.errors import ProcessError
from sparsify.world.launch import launch

START = """
from sparsify.world.launch import launch

def main():
    import os, sys
    print("a copy of", os.getppid() == parent, sys.argv[1:], os.environ["RANK"], "json" in sys.modules, flush=True)

if __name__ == "__main__":
    import os
    parent = os.getpid()
    launch(2, ["--version"], main, ["json"])
"""


def _said(text):
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def test_they_are_copies_of_one_that_has_imported_all():
    assert _said(START) == [f"a copy of True ['--version'] {rank} True" for rank in (0, 1)]


# As a torch that was built for GPUs says of itself.
KNOWS_A_GPU = """
import builtins
plain = builtins.__import__

def told(name, *more, **how):
    found = plain(name, *more, **how)
    if name == "torch" and hasattr(found, "backends") and hasattr(found.backends, "cuda"):
        found.backends.cuda.is_built = lambda: True
    return found

builtins.__import__ = told
"""


@pytest.mark.parametrize("before", ["import torch", KNOWS_A_GPU])
def test_what_does_not_live_through_a_copy_begins_anew(before):
    # Each prints what the command line does.
    assert _said(before + START) == [version("sparsify-fx")] * 2


def test_far_more_than_cores_are_refused_before_one_is_started():
    """A thousand of them would take the memory of everything else that runs there."""
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(ProcessError, match=f"--processes {max(cores, 8) + 1}: {cores} cores.*at most {cores}"):
        launch(max(cores, 8) + 1, ["--version"], lambda: None)


FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (90, 90))
from sparsify.errors import ProcessError
from sparsify.world import launch

def main():
    import time
    time.sleep(600)

launch._FEW = 100
try:
    launch.launch(100, ["--version"], main)
except ProcessError as error:
    print(error)
"""


def test_where_not_all_can_be_started_none_goes_on():
    (said,) = _said(FEW_FILES)
    assert "--processes 100: not all could be started (Too many open files)" in said
