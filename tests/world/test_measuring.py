"""Several processes measure what one does, to the last digit: perplexity, models before and after, passes compared;
and tune to what one does, but for the order in which gradients are added."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import process
from support.families import save
from support.processes import finish, start

import sparsify
from sparsify.errors import ProcessError
from sparsify.evaluation.compare import compare
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.tune import tune

pytest.importorskip("peft")
# What weights are apart, as a share of what training moved.
TUNED = 1e-3
RECIPE = {"method": "full", "steps": 4, "batch": 8, "micro": 2, "samples": 40, "length": 16, "rate": 1e-3}
PASSES = ["wanda:2:4", "sparsegpt:2:4", "magnitude:50%"]
CODE = """
import json
from sparsify.errors import ProcessError
from sparsify.evaluation.compare import compare
from safetensors.torch import load_file
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.tune import tune
folder, text, out, passes = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4].split(",")
windows = load_file(text)["ids"]
drawn = [torch.randint(3, 60, (128, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
with join() as world:
    found = sparsify.evaluate(folder, windows, world=world)
    made = sparsify.compile(folder, "wanda:2:4", calibration=drawn, evaluate=windows, world=world)
    table = compare(folder, passes, data=text, sequence_length=16, calibration=drawn, output=out, world=world)
    refused = []
    try:
        sparsify.evaluate(folder, windows[:9], world=world)
    except ProcessError as error:
        refused.append(str(error))
    tuned = tune(folder, text, out + "-tuned", Recipe(**json.loads(sys.argv[5])), world=world)
    told = {
        "tuned": [tuned.losses, tuned.perplexity],
        "losses": found.losses, "perplexity": found.perplexity, "judged": made.evaluation.as_dict(),
        "table": table.as_dict(), "refused": refused, "output": table.output is not None,
    }
    print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    place = tmp_path_factory.mktemp("measured")
    save("llama", place / "model")
    ids = torch.randint(3, 60, (96, 16), generator=torch.Generator().manual_seed(3))
    save_file({"ids": ids}, place / "ids.safetensors")
    return place


@pytest.fixture(scope="module")
def told(asked):
    words = [asked / "model", asked / "ids.safetensors", asked / "out", ",".join(PASSES), json.dumps(RECIPE)]
    done = finish(start(2, CODE, *words))
    assert [code for code, *_ in done] == [0, 0], done
    return [json.loads(said) for _, said, _ in done]


@pytest.mark.slow
def test_every_process_has_the_figures_of_one(told, asked):
    ids = torch.randint(3, 60, (96, 16), generator=torch.Generator().manual_seed(3))
    alone = sparsify.evaluate(asked / "model", ids)
    for each in told:
        assert tuple(each["losses"]) == alone.losses
        assert each["perplexity"] == alone.perplexity


@pytest.mark.slow
def test_a_compile_is_judged_by_all(told, asked):
    ids = torch.randint(3, 60, (96, 16), generator=torch.Generator().manual_seed(3))
    drawn = [torch.randint(3, 60, (128, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    alone = sparsify.compile(asked / "model", "wanda:2:4", calibration=drawn, evaluate=ids)
    assert told[0]["judged"] == told[1]["judged"] == alone.evaluation.as_dict()


@pytest.mark.slow
def test_passes_are_compared_as_by_one_process(told, asked):
    drawn = [torch.randint(3, 60, (128, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    words = {"data": asked / "ids.safetensors", "sequence_length": 16, "calibration": drawn}
    alone = compare(asked / "model", PASSES, **words)

    def plainly(table):
        # Seconds and memory are each process's own.
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in table["rows"]]
        return json.loads(json.dumps({**table, "rows": rows}))

    assert plainly(told[0]["table"]) == plainly(told[1]["table"]) == plainly(alone.as_dict())
    assert [each["output"] for each in told] == [True, False]
    written = json.loads((asked / "out/compare.json").read_text())
    assert written == told[0]["table"]
    assert sorted(path.name for path in asked.iterdir()) == ["ids.safetensors", "model", "out", "out-tuned"]


def apart(ours, theirs, before):
    """How far two folders of weights are from each other, as a share of how far training moved the second."""
    one, other, dense = (load_file(folder / "model.safetensors") for folder in (ours, theirs, before))
    moved = sum(float((other[name].float() - dense[name].float()).square().sum()) for name in other) ** 0.5
    return sum(float((other[name].float() - one[name].float()).square().sum()) for name in other) ** 0.5 / moved


@pytest.mark.slow
def test_all_weights_are_tuned_nearly_as_by_one_process(told, asked, tmp_path):
    alone = tune(asked / "model", str(asked / "ids.safetensors"), tmp_path / "one", Recipe(**RECIPE))
    for losses, perplexity in (each["tuned"] for each in told):
        assert losses == pytest.approx(alone.losses, rel=1e-5)
        assert perplexity == pytest.approx(alone.perplexity, rel=1e-5)
    assert apart(asked / "out-tuned", tmp_path / "one", asked / "model") < TUNED


RESUMED = """
import json
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.tune import tune
pruned, dense, text, out, recipe = sys.argv[1:6]
def stop(step, steps, loss):
    if step == 3:
        raise InterruptedError
with join() as world:
    words = {"teacher": dense, "save_every": 2, "world": world}
    try:
        tune(pruned, text, out, Recipe(**json.loads(recipe)), observe=stop, **words)
    except InterruptedError:
        tuned = tune(pruned, text, out, Recipe(**json.loads(recipe)), resume=True, **words)
        print(json.dumps([tuned.steps, tuned.losses]))
"""


@pytest.mark.exhaustive
def test_lora_with_a_teacher_goes_on_in_several_processes(asked, tmp_path):
    pruned, text = tmp_path / "pruned", asked / "ids.safetensors"
    sparsify.compile(asked / "model", "magnitude:2:4", output=pruned)
    recipe = {**RECIPE, "method": "lora", "dropout": 0.0, "rate": 1e-2}
    alone = tune(pruned, str(text), tmp_path / "one", Recipe(**recipe), teacher=asked / "model")
    words = [pruned, asked / "model", text, tmp_path / "two", json.dumps(recipe)]
    done = finish(start(2, RESUMED, *words))
    assert [code for code, *_ in done] == [0, 0], done
    for _, said, _ in done:
        steps, losses = json.loads(said)
        assert steps == 4 and losses == pytest.approx(alone.losses, rel=1e-4)
    assert apart(tmp_path / "two", tmp_path / "one", pruned) < TUNED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "pruned", "two"]


@pytest.mark.slow
def test_fewer_batches_of_windows_than_processes_are_refused(told):
    for each in told:
        assert "batches of 9 windows to share out among them: 1" in each["refused"][0]
        assert "or more windows" in each["refused"][0]


def test_what_is_not_dealt_out_is_refused_before_anything_is_opened(tmp_path):
    world = sparsify.World()
    world.size = 2
    with pytest.raises(ProcessError, match=r"parts of one step .* to share out among them: 1"):
        tune(tmp_path / "none", "random", tmp_path / "out", Recipe(batch=4, micro=4), world=world)
    with pytest.raises(ProcessError, match="passes to share out among them: 1"):
        compare(tmp_path / "none", ["wanda:2:4"], world=world)


@pytest.mark.slow
def test_eval_speaks_once(asked):
    words = ["eval", asked / "model", "--data", asked / "ids.safetensors", "--sequence-length", 16, "--json"]
    two, one = process(*words, "--processes", 2), process(*words)
    assert two.returncode == one.returncode == 0, two.stderr
    ours, theirs = json.loads(two.stdout), json.loads(one.stdout)
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
