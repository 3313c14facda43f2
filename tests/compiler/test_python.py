"""compile and evaluate as Python calls them: a string for a list, a Path for a name, texts, tokenizers; the result."""

from __future__ import annotations

import hashlib
import html.parser
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from torch import nn
from transformers import AutoTokenizer

import sparsify
from sparsify.errors import BackendError, CalibrationError, CheckpointError, SpecError
from sparsify.method.pattern import NM
from sparsify.passes.magnitude import Magnitude

ROOT = Path(__file__).parent.parent.parent
TEXTS = [f"def f{n}(x):\n    return x + {n}\n" * 60 for n in range(4)]
SMALL: dict[str, Any] = {"samples": 4, "sequence_length": 16}


@pytest.fixture(scope="module")
def bundled() -> Path:
    return ROOT / "models" / "pycode-6m"


@pytest.fixture(scope="module")
def tokenizer(bundled: Path) -> Any:
    return AutoTokenizer.from_pretrained(bundled)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


X = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def zeros(compiled: sparsify.Compiled) -> list[str]:
    return sorted(site.name for run in compiled.runs for site in run.sites)


@pytest.mark.parametrize("passes", ["magnitude:2:4", ["magnitude:2:4"], ("magnitude:2:4",), Magnitude(NM(2, 4))])
def test_one_pass_needs_no_list(net: nn.Module, passes: Any) -> None:
    made = sparsify.compile(net, passes, calibration=[X])
    assert [run.applied for run in made.runs] == [Magnitude(NM(2, 4))]


def test_several_passes_in_one_text(net: nn.Module) -> None:
    made = sparsify.compile(net, "magnitude:50%+wanda:2:4", calibration=[X])
    assert [run.applied.name for run in made.runs] == ["magnitude", "wanda"]
    with pytest.raises(SpecError, match="pass 'wonda': nothing of that name"):
        sparsify.compile(net, "magnitude:50%+wonda:2:4")


def test_one_name_needs_no_list(net: nn.Module) -> None:
    assert zeros(sparsify.compile(net, "magnitude:2:4", calibration=[X], ignore="2")) == ["0"]
    assert zeros(sparsify.compile(net, "magnitude:2:4", calibration=[X], only="2")) == ["2"]
    assert zeros(sparsify.compile(net, "magnitude:2:4", calibration=[X], only=["0", "2"], ignore=("0",))) == ["2"]
    with pytest.raises(SpecError, match="nosuch"):
        sparsify.compile(net, "magnitude:2:4", calibration=[X], ignore="nosuch")


def test_a_path_is_a_name(bundled: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(TEXTS))
    by_path = sparsify.compile(bundled, "wanda:2:4", calibration=file, **SMALL)
    by_name = sparsify.compile(str(bundled), "wanda:2:4", calibration=str(file), **SMALL)
    # The recipe names paths as they were given, in the history too.
    without = [{k: v for k, v in made.manifest.items() if k != "recipe"} for made in (by_path, by_name)]
    for manifest in without:
        manifest["history"] = [{k: v for k, v in run.items() if k != "recipe"} for run in manifest["history"]]
    assert without[0] == without[1] and without[0]["calibration"]["data"] == str(file)


def test_texts_are_data(bundled: Path, tokenizer: Any) -> None:
    made = sparsify.compile(bundled, "wanda:2:4", calibration=iter(TEXTS), **SMALL)
    assert made.calibration is not None
    assert made.calibration.said == "4 texts given in Python" and made.calibration.sequences == 4
    text = "\n".join(tokenizer.batch_decode([batch["input_ids"][0] for batch in made.calibration.batches]))
    assert "return x +" in text
    for texts, why in ((["", " \n"], "nothing in them"), (["a\0b"], "NUL"), (["x"], "the longest of 0 tokens")):
        with pytest.raises(CalibrationError, match=why):
            sparsify.compile(bundled, "wanda:2:4", calibration=texts, **SMALL)
    with pytest.raises(CalibrationError, match="a batch of type str"):
        sparsify.compile(bundled, "wanda:2:4", calibration=[torch.zeros(1, 4).long(), "text"], **SMALL)


@pytest.mark.slow
def test_a_model_in_memory_takes_a_tokenizer(bundled: Path, tokenizer: Any) -> None:
    model = sparsify.load(bundled)
    given = sparsify.compile(model, "wanda:2:4", calibration=TEXTS, tokenizer=tokenizer, **SMALL)
    own = sparsify.compile(bundled, "wanda:2:4", calibration=TEXTS, **SMALL)
    assert given.calibration is not None and own.calibration is not None
    assert given.calibration.digest == own.calibration.digest
    with pytest.raises(CheckpointError, match=r"a module in memory, which has none\..* with tokenizer="):
        sparsify.compile(model, "wanda:2:4", calibration=TEXTS, **SMALL)
    found = [
        sparsify.evaluate(given.model, TEXTS, tokenizer=tokenizer, sequence_length=32, windows=4),
        sparsify.evaluate(given, TEXTS, sequence_length=32, windows=4),
        sparsify.evaluate(own, TEXTS, sequence_length=32, windows=4),
    ]
    assert len({f"{each.perplexity:.6f}" for each in found}) == 1
    assert {(each.windows, each.sequence_length, each.data) for each in found} == {(4, 32, "4 texts given in Python")}


def test_what_is_evaluated_by_ids(bundled: Path, tokenizer: Any) -> None:
    ids = torch.tensor(tokenizer("\n\n".join(TEXTS))["input_ids"])[: 4 * 32].view(4, 32)
    by_text = sparsify.evaluate(bundled, TEXTS, sequence_length=32, windows=4)
    by_ids = sparsify.evaluate(bundled, ids)
    assert by_ids.perplexity == by_text.perplexity and by_ids.data == "token ids given in Python"
    assert sparsify.evaluate(bundled, ids, windows=2).windows == 2
    for data in (ids.float(), ids[0], [ids], 7):
        with pytest.raises(CalibrationError, match="data to evaluate on"):
            sparsify.evaluate(bundled, data)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="sequence length 16: windows of 32 token ids"):
        sparsify.evaluate(bundled, ids, sequence_length=16)


def test_sequences_past_the_context_are_said(folder: Callable[[str], Path]) -> None:
    ids = torch.randint(3, 60, (2, 100))
    with pytest.warns(UserWarning, match="sequences of 100 tokens, and the context of llama is 64 tokens"):
        sparsify.compile(folder("llama"), "wanda:2:4", calibration=ids)
    with pytest.warns(UserWarning, match="sequences of 100 tokens, and the context of llama is 64 tokens"):
        sparsify.evaluate(folder("llama"), ids)


class Cells(html.parser.HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.said: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_the_result_says_what_it_is_in_a_line_a_text_and_a_table() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"<script>alert(1)</script>": nn.Linear(16, 16), "b\x1b[31m": nn.Linear(16, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.inner.values():
                x = layer(x)
            return x

    made = sparsify.compile(Net(), "magnitude:2:4+wanda:2:4", calibration=[X])
    # 192 of 408 numbers: biases stay.
    assert repr(made) == str(made) == "<Compiled net: magnitude:2:4 + wanda:2:4, 47.1% of its weights zero; in memory>"
    text = made.summary()
    assert text.splitlines()[0] == repr(made) and "calibrated on 32 samples: batches given in Python" in text
    assert "all" in text and "50.00%" in text and "\x1b" not in text and "b\\x1b[31m" in text
    assert max(map(len, text.splitlines())) < 100 and len(text.splitlines()) < 16
    page = Cells()
    page.feed(made._repr_html_())
    assert page.tags == {"div", "p", "table", "thead", "tbody", "tr", "th", "td"}
    assert any("<script>alert(1)</script>" in said for said in page.said)
    planned = sparsify.compile(Net(), "magnitude:50%", calibration=[X], dry_run=True)
    assert repr(planned) == "<Compiled net: magnitude:50%; a dry run: nothing was pruned>"
    with pytest.raises(SpecError, match="a dry run, which pruned nothing"):
        sparsify.evaluate(planned, torch.zeros(1, 4).long())


def files(folder: Path) -> dict[str, str]:
    found = {p.relative_to(folder): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


@pytest.mark.first(2)
@pytest.mark.parametrize(
    ("family", "to"),
    [
        ("llama", "hf"),
        ("llama", "packed:choice=smallest"),
        pytest.param("llama", "onnx", marks=pytest.mark.slow),
        ("mixtral", "hf"),
        ("mixtral", "packed:choice=smallest"),
    ],
)
def test_what_is_saved_afterwards_is_what_an_output_would_have_been(
    family: str, to: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "calibration": ids,
        "ignore": "*layers.0.*experts.1.*" if family == "mixtral" else "*q_proj",
    }
    at_once = sparsify.compile(folder(family), "sparsegpt:2:4", output=tmp_path / "once", to=to, **options)
    made = sparsify.compile(folder(family), "sparsegpt:2:4", **options)
    assert made.output is None
    assert made.save(tmp_path / "saved", to=to) == tmp_path / "saved" == made.output
    assert files(tmp_path / "saved") == files(tmp_path / "once") and made.notes == at_once.notes
    assert "written to" in repr(made)
    # And once more, from what was written, or over it.
    with pytest.raises(BackendError, match="exists"):
        made.save(tmp_path / "saved", to=to)
    made.save(tmp_path / "saved", to=to, overwrite=True)
    at_once.save(tmp_path / "again", to=to)
    assert files(tmp_path / "saved") == files(tmp_path / "once") == files(tmp_path / "again")


def test_modules_and_smaller_models_are_saved_too(tmp_path: Path) -> None:
    model = build("llama")
    ids = torch.randint(3, 60, (16, 12), generator=torch.Generator().manual_seed(0))
    for spec in ("wanda:2:4", "llm-pruner:25%", "llm-pruner:25%+wanda:2:4+refine:epochs=1"):
        name = spec.replace(":", "-")
        sparsify.compile(model, spec, calibration=ids, output=tmp_path / f"{name}-once")
        made = sparsify.compile(model, spec, calibration=ids)
        made.save(tmp_path / f"{name}-saved")
        assert files(tmp_path / f"{name}-saved") == files(tmp_path / f"{name}-once"), spec


def test_nothing_is_left_of_what_cannot_be_saved(net: nn.Module, folder: Callable[[str], Path], tmp_path: Path) -> None:
    made = sparsify.compile(folder("llama"), "magnitude:2:4")
    with pytest.raises(SpecError, match="nosuch"):
        made.save(tmp_path / "out", to="nosuch")

    def stop(step: sparsify.Progress) -> None:
        if step.phase == "checking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.save(tmp_path / "out", progress=stop)
    lowered = sparsify.compile(net, "magnitude:2:4+lower-sparse:choice=smallest", calibration=[X])
    with pytest.raises(SpecError, match="a graph that lower-sparse:choice=smallest changed"):
        lowered.save(tmp_path / "out")
    with pytest.raises(SpecError, match="no pass in it"):
        sparsify.compile(folder("llama"), to="onnx").save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_progress_is_told_of_every_phase(bundled: Path, tmp_path: Path) -> None:
    told: list[sparsify.Progress] = []
    said = io.StringIO()
    with redirect_stderr(said):
        sparsify.compile(
            bundled, "wanda:2:4", calibration="self", samples=3, sequence_length=8, output=tmp_path / "out",
            progress=True, observe=told.append,
        )  # fmt: skip
    phases = list(dict.fromkeys(step.phase for step in told))
    assert phases == ["loading", "tracing", "sampling", "copying", "pruning", "checking"]
    assert [line.split()[0].rstrip(":") for line in said.getvalue().splitlines()] == [
        "loading", "tracing", "loading", "sampling", "copying", "pruning", "checking",
    ]  # fmt: skip
    sampled = [step.done for step in told if step.phase == "sampling"]
    assert sampled == sorted(sampled) and sampled[0] == 0 and sampled[-1] == 3 and len(sampled) == 8
