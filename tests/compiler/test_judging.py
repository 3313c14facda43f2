"""``evaluate=`` of compile: before and after on one text, and what is refused before any work."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sparsify
from sparsify.analysis.graph_pass import GraphPass
from sparsify.analysis.linear import find_sites
from sparsify.compiler import stages
from sparsify.context import Context
from sparsify.errors import CalibrationError, SparsifyError, SpecError, TraceError
from sparsify.ir.program import Program

IDS = torch.randint(3, 60, (9, 24), generator=torch.Generator().manual_seed(3))
SMALL: dict[str, Any] = {"samples": 4, "sequence_length": 16, "calibration": "random"}


@pytest.mark.first(2)
@pytest.mark.parametrize(
    ("passes", "to"),
    [
        ("wanda:2:4", "hf"),
        ("wanda:2:4", "packed"),
        ("wanda:2:4", "cuda"),
        ("llm-pruner:50%,importance=l1+magnitude:2:4", "hf"),
        ("llm-pruner:50%,importance=l1", "hf"),
        ("permute:2:4+twin:2:4+refine:epochs=1,batch=1,guard=0.25", "packed"),
    ],
)
def test_the_figures_are_those_of_the_folder(
    passes: str, to: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    made = sparsify.compile(folder("llama"), passes, evaluate=IDS, output=tmp_path / "out", to=to, **SMALL)
    judged = made.evaluation
    assert judged is not None
    dense, written = sparsify.evaluate(folder("llama"), IDS), sparsify.evaluate(tmp_path / "out", IDS)
    assert judged.dense.losses == dense.losses and judged.dense.perplexity == dense.perplexity
    assert judged.pruned.perplexity == pytest.approx(written.perplexity, rel=1e-6)
    assert judged.pruned.perplexity != judged.dense.perplexity
    again = written.against(dense)
    assert judged.ratio == pytest.approx(again.ratio, rel=1e-6)
    assert judged.standard_error == pytest.approx(again.standard_error, rel=1e-3)
    said = json.loads((tmp_path / "out" / "sparsify.json").read_text())["evaluation"]
    assert said == {
        "data": "token ids given in Python", "windows": 9, "sequence_length": 24, "sha256": dense.sha256,
        "dense": judged.dense.perplexity, "pruned": judged.pruned.perplexity, "ratio": judged.ratio,
        "standard_error": judged.standard_error, "verdict": judged.verdict,
    }  # fmt: skip


@pytest.mark.slow
def test_onnx_and_memory(folder: Callable[[str], Path], tmp_path: Path) -> None:
    words: dict[str, Any] = {"evaluate": IDS, "eval_windows": 5, **SMALL}
    kept = sparsify.compile(folder("llama"), "wanda:2:4", **words)
    graph = sparsify.compile(folder("llama"), "wanda:2:4", output=tmp_path / "onnx", to="onnx", **words)
    assert kept.evaluation is not None and graph.evaluation is not None
    assert kept.evaluation.as_dict() == graph.evaluation.as_dict() and kept.evaluation.pruned.windows == 5
    assert kept.evaluation.pruned.losses == sparsify.evaluate(kept, IDS, windows=5).losses
    assert json.loads((kept.save(tmp_path / "saved") / "sparsify.json").read_text())["evaluation"] == (
        kept.evaluation.as_dict()
    )
    assert kept.summary().endswith(kept.evaluation.verdict) and kept.evaluation.verdict in kept._repr_html_()
    assert sparsify.compile(folder("llama"), "wanda:2:4", **SMALL).evaluation is None


@pytest.mark.slow
def test_text_that_judges_never_calibrates(bundled: Path, tmp_path: Path) -> None:
    """Of one file for both the last tenth judges; of a copy of it too; a file that only judges is read whole."""
    text = "".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(400))
    for name in ("a.txt", "copy.txt"):
        (tmp_path / name).write_text(text)
    short: dict[str, Any] = {"samples": 2, "sequence_length": 32, "eval_windows": 3}
    for name in ("a.txt", "copy.txt"):
        made = sparsify.compile(bundled, "wanda:2:4", calibration=tmp_path / "a.txt", evaluate=tmp_path / name, **short)
        assert made.calibration is not None and made.evaluation is not None
        assert made.calibration.label.endswith("(its first 90%)")
        assert made.evaluation.dense.data == f"{tmp_path / name} (its last 10%, held out)"
    plain = sparsify.compile(bundled, "magnitude:2:4", evaluate=tmp_path / "a.txt", **short)
    assert plain.evaluation is not None and plain.evaluation.dense.data == str(tmp_path / "a.txt")
    whole = sparsify.evaluate(bundled, tmp_path / "a.txt", windows=3, sequence_length=32)
    assert plain.evaluation.dense.losses == whole.losses
    with pytest.raises(SpecError, match="texts that calibrate as well"):
        sparsify.compile(bundled, "wanda:2:4", calibration=["a", "b"], evaluate=["b"], **short)


def test_text_that_made_the_model_is_said_so(bundled: Path, tmp_path: Path) -> None:
    """A folder that was calibrated on this text before; and what is pruned already is not called dense."""
    file = tmp_path / "a.txt"
    file.write_text("import os\nprint(os.getcwd())\n" * 200)
    short: dict[str, Any] = {"samples": 2, "sequence_length": 32}
    sparsify.compile(bundled, "wanda:2:4", calibration=file, output=tmp_path / "one", **short)
    made = sparsify.compile(tmp_path / "one", "magnitude:80%", evaluate=file, eval_windows=12, **short)
    assert made.evaluation is not None
    assert made.evaluation.dense.data == f"{file} (on which the model was calibrated: not held out)"
    assert "times the perplexity before: " in made.evaluation.verdict


def test_what_to_do_next_is_what_was_not_done(folder: Callable[[str], Path]) -> None:
    said, refined = {}, "twin:2:4+refine:epochs=1,batch=1,guard=0.25"
    for passes in ("magnitude:2:4", "twin:2:4", refined, "llm-pruner:25%,importance=l1"):
        made = sparsify.compile(folder("llama"), passes, evaluate=IDS, **SMALL)
        assert made.evaluation is not None
        said[passes] = [word for word in ("twin", "refine", "tune", "sensitivity") if word in made.evaluation.do]
    assert said == {
        "magnitude:2:4": ["twin", "refine", "sensitivity"],
        "twin:2:4": ["refine", "sensitivity"],
        refined: ["tune", "sensitivity"],
        "llm-pruner:25%,importance=l1": ["refine", "tune"],
    }


@dataclass(frozen=True)
class Huge(GraphPass):
    """Finite weights whose products are not."""

    name: ClassVar[str] = "huge"
    summary: ClassVar[str] = "weights past all measure"

    def apply(self, program: Program, batches: Sequence[Mapping[str, Tensor]] | None, context: Context) -> None:
        for name in dict.fromkeys(site.parameter for site in find_sites(program)[0]):
            program.weights.write(name, torch.full_like(program.weights.read(name), 1e30))


def test_a_model_that_predicts_nothing_is_judged_and_written(folder: Callable[[str], Path], tmp_path: Path) -> None:
    made = sparsify.compile(folder("llama"), Huge(), evaluate=IDS, output=tmp_path / "out")
    assert made.evaluation is not None and math.isinf(made.evaluation.ratio)
    text = (tmp_path / "out" / "sparsify.json").read_text()
    said = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["evaluation"]
    assert (said["pruned"], said["ratio"], said["standard_error"]) == (None, None, None)
    assert said["verdict"].startswith("its perplexity is no number")
    assert "no number after" in made.summary()


WRONG: dict[str, tuple[str, dict[str, Any], type[SparsifyError], str]] = {
    "no text": ("llama", {"evaluate": "nowhere.txt"}, CalibrationError, r"data 'nowhere.txt': no such file"),
    "no causal model": ("bert", {"evaluate": IDS}, TraceError, "not a causal language model"),
    "nor here": ("t5", {"evaluate": IDS}, TraceError, "not a causal language model"),
    "no pass": ("llama", {"passes": (), "to": "onnx", "evaluate": "a.txt"}, SpecError, "nothing to compare"),
    "no window": ("llama", {"evaluate": IDS, "eval_windows": 0}, SpecError, "--eval-windows 0: fewer than one"),
    "no eval": ("llama", {"eval_windows": 3}, SpecError, "--eval-windows 3: no text to evaluate on"),
    "no ids": ("llama", {"evaluate": IDS.float()}, CalibrationError, "data to evaluate on"),
    "other ids": ("llama", {"evaluate": IDS + 60}, CalibrationError, "vocabulary has 64 tokens"),
    "other graph": ("llama", {"passes": "lower-sparse", "evaluate": IDS}, SpecError, "which is not the model's param"),
    "no tokenizer": ("llama", {"evaluate": ["some text"]}, SparsifyError, "tokenizer"),
}


@pytest.mark.parametrize("what", WRONG)
def test_it_is_refused_before_the_work(
    what: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, words, kind, why = WRONG[what]
    monkeypatch.setattr(stages, "load_calibration", lambda *args, **kwargs: pytest.fail("calibration was drawn"))
    words = {"passes": "wanda:2:4", "calibration": "random", **words}
    out = None if what == "other graph" else tmp_path / "out"
    with pytest.raises(kind, match=why):
        sparsify.compile(folder(family), output=out, **words)
    assert not (tmp_path / "out").exists()
    with pytest.raises(kind, match=why):
        sparsify.compile(folder(family), dry_run=True, **words)


def test_text_too_short_and_a_plan(bundled: Path, folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x = 1\n")
    with pytest.raises(CalibrationError, match="tokens in all"):
        sparsify.compile(bundled, "magnitude:2:4", evaluate=tmp_path / "a.txt")
    planned = sparsify.compile(folder("llama"), "wanda:2:4", evaluate=IDS, dry_run=True)
    assert planned.evaluation is None
    assert planned.notes == [
        "perplexity would be measured before and after, on 9 windows of 24 tokens of token ids given in Python"
    ]


def test_the_recipe_has_it(folder: Callable[[str], Path], tmp_path: Path) -> None:
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    made = sparsify.compile(
        folder("llama"),
        "wanda:2:4",
        evaluate=tmp_path / "ids.safetensors",
        eval_windows=4,
        **{**SMALL, "sequence_length": 24},
    )
    recipe = made.manifest["recipe"]
    assert (recipe["eval"], recipe["eval_windows"]) == (str(tmp_path / "ids.safetensors"), 4)
    assert "recipe" not in sparsify.compile(folder("llama"), "wanda:2:4", evaluate=IDS, **SMALL).manifest
