from __future__ import annotations

import os

# Before anything imports the hub's client: no test may reach for the network, nor a process that it starts.
os.environ["HF_HUB_OFFLINE"] = "1"
# The one thing that two runs of one command differ in; tests/provenance says how it is without.
os.environ.setdefault("SOURCE_DATE_EPOCH", "1000000000")
# Workers of two threads each share few cores: threads that wait must not keep one busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# As many tests run at once as there are cores: more threads than cores wait ten times as long as they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from support.families import inputs, save
from support.traces import ANEW, Traces
from support.zeroed import Reports

from sparsify.analysis.dimensions.groups import coupled_dimensions
from sparsify.analysis.dimensions.kinds import roles_of
from sparsify.frontend import capture as capturing
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.inspection.dimensions import DimensionReport
from sparsify.ir.program import Program

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


# Tests of minutes, which begin first: last, they would run alone.
LONGEST = ("tests/tools/test_gpu_run.py", "tests/world/")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    cases = Counter[str]()
    for item in items:
        function = item.nodeid.partition("[")[0]
        cases[function] += 1
        first = item.get_closest_marker("first")
        if first is not None and cases[function] > first.args[0]:
            item.add_marker("exhaustive")
        # Whoever leaves out the slow ones leaves out these.
        if item.get_closest_marker("exhaustive"):
            item.add_marker("slow")


@pytest.fixture(scope="module", autouse=True)
def light_heap() -> None:
    """What lives on (modules, traced families) is not searched by every garbage collection: a third of all time."""
    gc.collect()
    gc.freeze()


TRACES = Traces()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    TRACES.anew = item.nodeid.startswith(ANEW)


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Models that are alike are traced once per session, but where tracing is what is tested."""
    # That the heap is frozen is all that it would find, and takes as long to count as the heap is large.
    ours = patch.multiple(capturing, attempted=TRACES.attempted, young_heap=nullcontext)
    # Where vLLM is tested there is no onnx.
    theirs = patch("sparsify.backends.onnx.job.build_graph", TRACES.build_graph) if find_spec("onnx") else nullcontext()
    with ours, theirs:
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder("llama")``: the folder of that family's smallest model, made once per session; do not write to it."""
    return cache(lambda family: save(family, tmp_path_factory.mktemp("models") / family))


@pytest.fixture(scope="session")
def captured(folder: Callable[[str], Path]) -> Callable[[str], Program]:
    """``captured("llama")``: the graph of that folder for ``inputs("llama")``, traced once per session; do not change
    it, nor its weights."""
    return cache(lambda family: capture(open_source(folder(family)), inputs(family)))


@pytest.fixture(scope="session")
def report(captured: Callable[[str], Program]) -> Reports:
    """``report("llama")``: that graph and its coupled dimensions."""

    def of(name: str) -> tuple[Program, DimensionReport]:
        program = captured(name)
        return program, DimensionReport(name, coupled_dimensions(program), roles_of(program))

    return cache(of)


@pytest.fixture
def ids() -> torch.Tensor:
    """Four sequences of 16 tokens."""
    return torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def stories() -> Path:
    path = SHARED / "models" / "stories260k"
    if not path.exists():
        pytest.skip("shared/models/stories260k is not here")
    return path


@pytest.fixture(scope="session")
def bundled() -> Path:
    return ROOT / "models" / "pycode-6m"
