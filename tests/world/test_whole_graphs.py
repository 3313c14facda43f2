"""Passes over a whole graph among several processes: each runs them, and all go on with what the first one wrote."""

import pytest
import torch
from support.processes import batches_of, finish, model_of, start
from support.whole_graphs import Level, Noise

import sparsify

CODE = """
from support.processes import batches_of, model_of
from support.whole_graphs import Level, Noise
batches = batches_of("llama", [])
with join() as world:
    made = sparsify.compile(model_of("llama"), [Level(), Noise(), "wanda:2:4"], calibration=batches, world=world)
    lowered = sparsify.compile(model_of("llama"), ["wanda:2:4", "lower-sparse"], calibration=batches, world=world)
    outputs = lowered.model(**batches[0])
    torch.save([made.model.state_dict(), getattr(outputs, "logits", outputs)], f"{sys.argv[1]}/{world.rank}.pt")
"""


@pytest.mark.slow
def test_a_pass_over_the_graph_leaves_what_one_process_leaves(tmp_path):
    done = finish(start(2, CODE, tmp_path))
    assert [code for code, *_ in done] == [0, 0], done
    batches = batches_of("llama", [])
    torch.set_num_threads(1)
    alone = sparsify.compile(model_of("llama"), [Level(), Noise(), "wanda:2:4"], calibration=batches)
    lowered = sparsify.compile(model_of("llama"), ["wanda:2:4", "lower-sparse"], calibration=batches)
    outputs = lowered.model(**batches[0])
    theirs, logits = alone.model.state_dict(), getattr(outputs, "logits", outputs)
    for rank in range(2):
        ours, said = torch.load(tmp_path / f"{rank}.pt")
        assert [name for name in theirs if not ours[name].equal(theirs[name])] == []
        if isinstance(logits, torch.Tensor):
            assert said.equal(logits)
