"""Processes that do not fit each other, fail, end or hang: said by all, with the cause, and nothing is written."""

import signal
import time

import pytest
from support.processes import finish, start

import sparsify
from sparsify.errors import ProcessError
from sparsify.world.joining import join, size_told

CODE = """
from support.families import build, inputs
batches = [inputs("llama", rows=128, seed=seed) for seed in range(4)]
with join() as world:
    {more}
    sparsify.compile(build("llama"), {spec}, calibration=batches{words}, world=world)
"""


def said_by_each(more="pass", spec='"wanda:2:4"', words=""):
    done = finish(start(2, CODE.format(more=more, spec=spec, words=words)))
    assert all(code for code, *_ in done), done
    return [error.strip().splitlines()[-1] for *_, error in done]


@pytest.mark.first(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"words": ", seed=world.rank"}, "seed (0, 1)"),
        pytest.param({"more": "batches = batches[:3] if world.rank else batches"}, "data", marks=pytest.mark.slow),
        pytest.param({"spec": '"wanda:2:4" if world.rank else "wanda:4:8"'}, "passes", marks=pytest.mark.slow),
        pytest.param({"words": ", ignore=['*q_proj'] if world.rank else []"}, "ignore", marks=pytest.mark.slow),
    ],
)
def test_processes_that_were_asked_otherwise_are_refused(changed, found):
    for said in said_by_each(**changed):
        assert "ProcessError" in said and "asked otherwise" in said and found in said


@pytest.mark.slow
def test_an_input_that_is_not_finite_names_site_and_batch_on_all():
    code = """
from support.families import build, inputs
batches = [inputs("llama", rows=128, seed=seed) for seed in range(4)]
batches[3]["input_ids"].fill_(63)
net = build("llama")
net.model.embed_tokens.weight.data[63] = float("nan")
with join() as world:
    sparsify.compile(net, "wanda:2:4", calibration=batches, allow_nan=True, world=world)
"""
    first, second = (error for *_, error in finish(start(2, code)))
    assert "NaN or infinity in calibration batch 3" in second
    assert "process 1 of 2" in first and "NaN or infinity in calibration batch 3" in first and "q_proj" in first


@pytest.mark.first(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "found"),
    [(signal.SIGKILL, "process 1 of 2"), pytest.param(signal.SIGSTOP, "not heard of", marks=pytest.mark.slow)],
)
def test_a_process_that_is_gone_or_hangs_ends_the_others(number, found):
    code = """
import time
with join() as world:
    world.says("pruning here")
    world.told("begin")
    print("ready", flush=True)
    if world.rank:
        time.sleep(100)
    world.told("end")
"""
    processes = start(2, code, SPARSIFY_PATIENCE="3")
    assert processes[0].stdout is not None
    assert processes[0].stdout.readline() == "ready\n"
    time.sleep(1.5)
    processes[1].send_signal(number)
    code_of_first, _, error = finish(processes, 60)[0]
    assert code_of_first == 1
    assert "ProcessError" in error and found in error and "process 1 of 2, pruning here" in error
    # One that was stopped is not left behind.
    assert processes[1].returncode == -signal.SIGKILL


def test_what_processes_do_not_share_is_refused_before_anything_is_opened(tmp_path):
    world = sparsify.World()
    world.size = 5
    with pytest.raises(ProcessError, match=r"(?s)pass refine by 5 processes.*one step to share out among them: 4"):
        sparsify.compile(tmp_path / "none", ["wanda:2:4", "refine"], world=world)


def test_fewer_batches_than_processes_is_said():
    world = sparsify.World()
    world.size = 3
    with pytest.raises(ProcessError, match="3 processes: calibration batches to share out among them: 2"):
        world.share([1, 2], "calibration batches")


@pytest.mark.parametrize(
    "told", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "2"}]
)
def test_an_environment_in_parts_is_refused(told):
    with pytest.raises(ProcessError, match="does not say which of them this is"):
        size_told({"MASTER_ADDR": "here", "MASTER_PORT": "1", **told} if len(told) > 1 else told)


@pytest.mark.parametrize("patience", ["never", "1", "inf"])
def test_patience_that_cannot_be_meant_is_refused(patience, monkeypatch):
    told = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**told, "SPARSIFY_PATIENCE": patience}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match="SPARSIFY_PATIENCE"), join():
        pass


def test_a_process_alone_joins_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join() as world:
        assert (world.rank, world.size, world.leads, world.divided) == (0, 1, True, False)
