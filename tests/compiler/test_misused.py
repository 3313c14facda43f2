"""What is given from Python where something else is meant: a sentence, never an error of Python's own."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsify
from sparsify.errors import CheckpointError, SparsifyError, SpecError
from sparsify.method.pattern import NM
from sparsify.passes.magnitude import Magnitude

IDS = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(3))

WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "report of nothing": (lambda model: sparsify.report(None), "a page: NoneType, which names no model"),  # type: ignore[arg-type]
    "report of a number": (lambda model: sparsify.report(3), "a page: int"),  # type: ignore[arg-type]
    "diff of numbers": (lambda model: sparsify.diff(1, 2), "comparing two models: int"),  # type: ignore[arg-type]
    "a bare budget": (
        lambda model: sparsify.search(model, "magnitude", budget=1.05, data="a.txt"),  # type: ignore[arg-type]
        "budget 1.05: float. Write perplexity<=1.05",
    ),
    "texts that judge": (
        lambda model: sparsify.search(model, "magnitude", budget="perplexity<=1.05", data=["abc"]),  # type: ignore[arg-type]
        "data that judge: list, where a source is named",
    ),
    "a number of tasks": (lambda model: sparsify.evaluate(model, tasks=3), "tasks 3: int"),  # type: ignore[call-overload]
    "a limit in words": (
        lambda model: sparsify.evaluate(model, tasks="boolq", limit="x"),  # type: ignore[call-overload]
        "--limit x: str, no whole number",
    ),
    "windows of tasks": (
        lambda model: sparsify.evaluate(model, tasks="boolq", windows=2),
        "--windows: tasks alone.*--limit",
    ),
    "another kind of result": (
        lambda model: sparsify.evaluate(model, IDS).differences(3),
        "comparing two evaluations: int",
    ),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRONG)
def test_it_is_a_sentence(case: str, folder: Callable[[str], Path]) -> None:
    call, said = WRONG[case]
    with pytest.raises(SpecError, match=said):
        call(folder("llama"))


# What is meant by each is looked at before it is used; flags are taken by their truth, as Python takes them.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "compile": (sparsify.compile, {"passes": "wanda:2:4", "calibration": IDS}),
    "evaluate": (sparsify.evaluate, {"data": IDS}),
    "search": (sparsify.search, {"method": "magnitude", "budget": "perplexity<=1.05", "data": "random"}),
    "sensitivity": (sparsify.sensitivity, {"method": "magnitude:2:4", "data": "random"}),
    "report": (sparsify.report, {"output": "page.html"}),
    "diff": (sparsify.diff, {}),
    "load": (sparsify.load, {}),
}
# Called when there is something to tell; compile says which seed and which passes' objects it takes by duck.
TOLD = ("tell", "after", "observe")


def asked_of(name: str) -> list[str]:
    parameters = signature(CALLS[name][0]).parameters.values()
    return [p.name for p in parameters if p.name not in TOLD and not isinstance(p.default, bool)]


@pytest.mark.parametrize(("name", "word"), [(name, word) for name in CALLS for word in asked_of(name)])
def test_no_object_of_any_kind_is_an_error_of_pythons_own(
    name: str, word: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, others = CALLS[name]
    first = next(iter(signature(call).parameters))
    given = {first: folder("llama"), **({"b": folder("llama")} if name == "diff" else {}), **others, word: object()}
    with pytest.raises(SparsifyError):
        call(**given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("amount", ["2", 2.5, True, 0, -1])
@pytest.mark.parametrize("word", ["samples", "sequence_length", "eval_windows", "seed"])
def test_an_amount_is_a_whole_number(word: str, amount: Any, folder: Callable[[str], Path]) -> None:
    if (word, amount) == ("seed", 0):
        pytest.skip("a seed")
    with pytest.raises(SpecError):
        sparsify.compile(folder("llama"), "magnitude:2:4", evaluate=IDS, **{word: amount})


@pytest.mark.parametrize("names", ["*.q_proj,*.k_proj", ["*.q_proj,*.k_proj"], ("*.q_proj", "*.k_proj")])
def test_names_are_given_alike_everywhere(names: Any, folder: Callable[[str], Path], tmp_path: Path) -> None:
    dense, text = folder("llama"), tmp_path / "ids.safetensors"
    save_file({"input_ids": IDS}, text)
    made = sparsify.compile(dense, "magnitude:2:4", only=names)
    kinds = {site.name.rpartition(".")[2] for run in made.runs for site in run.sites}
    costs = sparsify.sensitivity(dense, ["magnitude:2:4"], data=text, only=names, windows=1).costs
    made.save(tmp_path / "out")
    changed = [own.name for own in sparsify.diff(dense, tmp_path / "out", only=names).tensors]
    assert kinds == {"q_proj", "k_proj"} and len(costs) == len(changed) // 2 > 0


@pytest.mark.slow
def test_a_search_takes_a_pass_and_a_module_with_its_tokenizer(tmp_path: Path) -> None:
    bundled = Path(__file__).parent.parent.parent / "models" / "pycode-6m"
    (text := tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 200)
    model = AutoModelForCausalLM.from_pretrained(bundled)
    with pytest.raises(CheckpointError, match=r"a module in memory, which has none\. Give it with tokenizer="):
        sparsify.sensitivity(model, Magnitude(NM(2, 4)), data=text, windows=1, only="*.0.mlp.*")
    small: dict[str, Any] = {"data": text, "windows": 1, "sequence_length": 16, "only": "*.0.mlp.*"}
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    by_object = sparsify.sensitivity(model, Magnitude(NM(2, 4)), tokenizer=tokenizer, **small)
    by_name = sparsify.sensitivity(bundled, "magnitude:2:4", **small)
    assert [own.loss for own in by_object.costs] == pytest.approx([own.loss for own in by_name.costs])


def test_a_result_is_a_model_too(folder: Callable[[str], Path], tmp_path: Path) -> None:
    kept = sparsify.compile(folder("llama"), "magnitude:2:4")
    with pytest.raises(SpecError, match=r"memory alone\. Write it first: result\.save\(folder\)"):
        sparsify.report(kept, tmp_path / "page.html")
    with pytest.raises(SpecError, match="comparing two models: a result that lies in memory alone"):
        sparsify.diff(folder("llama"), kept)
    kept.save(tmp_path / "out")
    assert sparsify.report(kept, tmp_path / "page.html").is_file()
    assert not sparsify.diff(folder("llama"), kept).same
