"""Several processes prune what one would: to the bit where a method compares scores, nearly where it solves."""

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import batches_of, finish, model_of, start

import sparsify
from sparsify.method.spec import parse_pass
from sparsify.world.world import World

# What is compared: a family, passes, a schedule.
SAME = [
    ("llama", ["wanda:2:4"], "layer"),
    ("llama", ["wanda:50%,norm=l1"], "block"),
    ("llama", ["magnitude:50%", "wanda:4:8,norm=max"], "layer"),
    ("mixtral", ["wanda:2:4"], "layer"),
    ("mixtral", ["wanda:50%"], "dense"),
    ("opt", ["wanda:2:4"], "block"),
    ("opt", ["wanda:50%,allocation=owl"], "layer"),
    ("llama", ["magnitude:2:4"], "layer"),
    ("opt", ["activation:25%"], "layer"),
    ("mixtral", ["gblm:2:4"], "layer"),
    ("shared", ["gradient:50%,metric=snip"], "layer"),
    ("llama", ["gblm:50%,norm=l1,reduction=mean", "gradient:60%,metric=movement"], "block"),
    ("shared", ["gradient:50%,metric=platon"], "dense"),
    ("opt", ["gblm:2:4"], "block"),
    ("mixtral", ["permute:2:4", "wanda:2:4"], "layer"),
    ("llama", ["llm-pruner:25%,importance=taylor-mix,round=4", "wanda:2:4"], "layer"),
    ("opt", ["permute:2:4"], "layer"),
    ("llama", ["llm-pruner:50%,granularity=layer"], "layer"),
    ("llama", ["llm-pruner:50%,scope=global,round=4,steps=2"], "layer"),
]
NEAR = [
    ("llama", ["sparsegpt:2:4"], "layer"),
    ("llama", ["sparsegpt:50%"], "block"),
    ("llama", ["twin:2:4"], "layer"),
    ("opt", ["apt:2:4,mask=M"], "layer"),
    ("opt", ["wanda:2:4,update=sequential"], "layer"),
    ("mixtral", ["alps:50%"], "layer"),
    ("mixtral", ["twin:2:4", "round:int8"], "layer"),
]
# Gradients of a step are added otherwise: weights differ by so much of what training moved.
TRAINED = [
    ("llama", ["magnitude:2:4", "refine:epochs=2,rate=0.01"], "layer"),
    ("mixtral", ["magnitude:50%", "refine:epochs=1"], "layer"),
    ("opt", ["magnitude:2:4", "refine:epochs=1,last=error"], "block"),
]
MOVED = 1e-4
SHORT = [SAME[0], SAME[9], SAME[14], SAME[15], NEAR[0], NEAR[6], TRAINED[0]]
QUICK = [SAME[0], SAME[14], NEAR[6], TRAINED[0]]
CODE = """
import json
from support.processes import batches_of, model_of
cases, out = json.loads(sys.argv[1]), sys.argv[2]
with join() as world:
    for number, (family, passes, schedule) in enumerate(cases):
        batches = batches_of(family, passes)
        made = sparsify.compile(model_of(family), passes, calibration=batches, schedule=schedule, world=world)
        if number == 0:
            print(world.sent)
        if world.leads:
            told = [[site.error, site.tokens] for run in made.runs for site in run.sites]
            torch.save((made.model.state_dict(), told), f"{out}/{number}.pt")
        else:
            # Every process holds the result where it stays in memory.
            torch.save(made.model.state_dict(), f"{out}/other-{number}.pt")
"""


@pytest.fixture(
    scope="module",
    params=[
        (2, QUICK),
        pytest.param((2, [case for case in SAME + NEAR + TRAINED if case not in QUICK]), marks=pytest.mark.exhaustive),
        pytest.param((4, SHORT), marks=pytest.mark.slow),
        pytest.param((4, [case for case in SAME + NEAR + TRAINED if case not in SHORT]), marks=pytest.mark.exhaustive),
    ],
    ids=["two", "two-more", "four", "four-more"],
)
def pruned(request, tmp_path_factory):
    """The cases, and the folder that processes left their results in."""
    count, cases = request.param
    out = tmp_path_factory.mktemp("divided")
    done = finish(start(count, CODE, json.dumps(cases), out), 900)
    assert [code for code, *_ in done] == [0] * count, done
    assert all(int(said.split()[0]) > 1000 for _, said, _ in done)
    return cases, out


def alone(case):
    family, passes, schedule = case
    batches = batches_of(family, passes)
    made = sparsify.compile(model_of(family), passes, calibration=batches, schedule=schedule)
    return made.model.state_dict(), [[site.error, site.tokens] for run in made.runs for site in run.sites]


def beside_one_process(pruned, of):
    """Of each case among ``of`` the weights, errors and tokens: those that processes left, and those of one."""
    cases, out = pruned
    for number, case in enumerate(cases):
        if case in of:
            yield case, *torch.load(out / f"{number}.pt"), *alone(case)


def test_masks_are_those_of_one_process_to_the_bit(pruned):
    for case, ours, told, theirs, said in beside_one_process(pruned, SAME):
        assert [name for name in theirs if not ours[name].equal(theirs[name])] == [], case
        assert [tokens for _, tokens in told] == [tokens for _, tokens in said], case
        # Each process has a sketch of its own.
        for (error, _), (other, _) in zip(told, said, strict=True):
            assert (error is None) == (other is None), case
            assert error is None or error == pytest.approx(other, rel=0.25), case


def test_solved_weights_are_as_good_as_those_of_one_process(pruned):
    for case, ours, told, theirs, said in beside_one_process(pruned, NEAR):
        for name, weight in theirs.items():
            same = ((ours[name] == 0) == (weight == 0)).float().mean()
            assert same > 0.97, (case, name)
            assert (ours[name] - weight).norm() <= 0.2 * weight.norm() + 1e-5, (case, name)
        assert [error for error, _ in told] == pytest.approx([error for error, _ in said], rel=0.25), case


def test_trained_weights_are_nearly_those_of_one_process(pruned):
    for case, ours, _, theirs, _ in beside_one_process(pruned, TRAINED):
        family, passes, schedule = case
        before, _ = alone((family, passes[:-1], schedule))
        moved = sum(float((theirs[name] - before[name]).square().sum()) for name in theirs) ** 0.5
        apart = sum(float((theirs[name] - ours[name]).square().sum()) for name in theirs) ** 0.5
        assert moved > 0 and apart <= MOVED * moved, (case, apart / moved)
        assert all(((ours[name] == 0) == (theirs[name] == 0)).all() for name in theirs), case


def test_every_process_has_the_same_result(pruned):
    cases, out = pruned
    for number, case in enumerate(cases):
        ours, _ = torch.load(out / f"{number}.pt")
        other = torch.load(out / f"other-{number}.pt")
        assert all(ours[name].equal(other[name]) for name in ours), case


BY_ROWS = [
    "wanda:2:4", "wanda:50%", "wanda:50%,count=threshold", "magnitude:2:4", "magnitude:50%,group=output",
    "sparsegpt:2:4", "sparsegpt:2:4,compensation=exact", "apt:2:4", "apt:50%,mask=wanda", "round:int8",
    "round:int4,group=32", "wanda:2:4,update=iterative", "gblm:2:4",
]  # fmt: skip
TOGETHER = ["magnitude:50%", "wanda:50%,group=layer", "wanda:50%,blocksize=4", "sparsegpt:50%", "alps:2:4", "twin:2:4"]


@settings(max_examples=25, deadline=None)
@given(spec=st.sampled_from(BY_ROWS), seed=st.integers(0, 1000), cut=st.integers(1, 11))
def test_a_method_by_rows_prunes_rows_as_it_does_among_others(spec, seed, cut):
    from sparsify.method.statistics import InputStatistics

    generator = torch.Generator().manual_seed(seed)
    method = parse_pass(spec)
    assert method.by_rows
    rows, weight = torch.randn(300, 64, generator=generator), torch.randn(12, 64, generator=generator)
    gradient = torch.rand(12, 64, generator=generator)

    def statistics(part):
        values = {
            "squared_norm": rows.double().square().sum(0), "gram": rows.t() @ rows, "gradient_l1": gradient[part],
            "gradient_l2": gradient[part], "absolute_sum": rows.double().abs().sum(0),
        }  # fmt: skip
        return InputStatistics(values, 300, 1)

    whole = method.prune(weight.clone(), statistics(slice(None)))
    for part in (slice(0, cut), slice(cut, 12)):
        alone = method.prune(weight[part].clone(), statistics(part))
        assert alone.mask.equal(whole.mask[part])
        assert torch.allclose(alone.weight, whole.weight[part], atol=1e-3)


@pytest.mark.parametrize("spec", TOGETHER)
def test_a_method_that_compares_rows_is_not_divided_by_them(spec):
    assert not parse_pass(spec).by_rows


@given(count=st.integers(1, 200), size=st.integers(1, 64))
def test_shares_are_consecutive_and_whole(count, size):
    world = World()
    world.size = size
    bounds = [world.bounds(count, rank) for rank in range(size)]
    assert [number for start, stop in bounds for number in range(start, stop)] == list(range(count))
    assert max(stop - start for start, stop in bounds) - min(stop - start for start, stop in bounds) <= 1
    assert all(
        start <= number < stop for number in range(count) for start, stop in [bounds[world.owner(count, number)]]
    )
    assert Fraction(count, size) - 1 < min(stop - start for start, stop in bounds)
