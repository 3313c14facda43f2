"""``compare``: the same tokens for every pass, one table, one picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.command_line import sparsify

from sparsify.errors import BackendError, SparsifyError
from sparsify.evaluation.compare import compare
from sparsify.files.ownership import Claim
from sparsify.frontend.source import open_source
from sparsify.journal.left import left_of
from sparsify.method.spec import split_specs
from sparsify.quality.perplexity import perplexity


@pytest.fixture(scope="module")
def model(folder: Callable[[str], Path]) -> Path:
    return folder("llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids of a small vocabulary, which need no tokenizer."""
    path = tmp_path_factory.mktemp("text") / "held.safetensors"
    save_file({"input_ids": torch.randint(3, 60, (2000,), generator=torch.Generator().manual_seed(0))}, path)
    return path


@pytest.mark.slow
def test_compare_from_the_command_line(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    done = sparsify(
        "compare",
        model,
        "--passes",
        "magnitude:2:4,wanda:50%,group=layer,sparsegpt:2:4",
        "--data",
        text,
        "--calibration",
        text,
        "--samples",
        4,
        "--sequence-length",
        64,
        "--windows",
        4,
        "-o",
        out,
    )
    assert done.returncode == 0, done.stderr
    for word in ("dense", "magnitude:2:4", "wanda:50%,group=layer", "sparsegpt:2:4", "perplexity", "peak memory"):
        assert word in done.stdout
    found = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in found["rows"]] == [
        "dense",
        "magnitude:2:4",
        "wanda:50%,group=layer",
        "sparsegpt:2:4",
    ]
    assert "(its first 90%)" in found["calibration"] and "its last 10%, held out" in found["data"]
    ids = load_file(text)["input_ids"][1800:]
    dense = perplexity(open_source(model), ids[: len(ids) // 64 * 64].view(-1, 64)[:4])
    assert found["rows"][0]["perplexity"] == pytest.approx(dense)
    for row in found["rows"][1:]:
        assert row["perplexity"] > 0 and row["seconds"] > 0 and len(row["errors"]) > 10
        assert row["error"] == pytest.approx(sum(row["errors"].values()) / len(row["errors"]))
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    svg = (out / "compare.svg").read_text()
    assert "<svg" in svg and "sparsegpt:2:4" in (out / "compare.md").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["compare.json", "compare.md", "compare.png", "compare.svg"]


def test_without_text_there_is_no_perplexity(model: Path, text: Path) -> None:
    result = compare(model, ["wanda:2:4"], calibration=str(text), samples=2, sequence_length=32)
    assert result.rows[0].perplexity is None and result.rows[1].perplexity is None
    assert result.rows[1].error is not None and "perplexity" in result.markdown()


@pytest.mark.parametrize("specs", [[], ["wanda:2:5:7"], ["nothing:2:4"]])
def test_bad_specs_are_refused_before_anything_is_read(specs: list[str], tmp_path: Path) -> None:
    with pytest.raises(SparsifyError):
        compare(tmp_path / "no-model", specs)


def test_nothing_is_written_where_a_pass_fails(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    with pytest.raises(SparsifyError, match="one stream"):
        compare(model, ["twin:2:4"], calibration=str(text), samples=2, sequence_length=32, schedule="dense", output=out)
    # But the dense model's row is kept, for who leaves that pass out.
    assert not out.exists() and [left.finished for left in left_of(out)] == [1]
    assert [left.path for left in left_of(out)] == list(tmp_path.iterdir())


options = st.sampled_from(["group=layer", "update=exact", "blocksize=4", "count=exact"])
specs = st.builds(
    lambda n, o: ",".join([n, *o]), st.sampled_from(["wanda:2:4", "magnitude:50%", "apt:0.5"]), st.lists(options)
)


@given(st.lists(specs, max_size=5))
def test_specs_are_split_at_the_right_commas(given: list[str]) -> None:
    assert split_specs(",".join(given)) == given


def test_another_job_on_the_output_is_told_before_the_work(model: Path, text: Path, tmp_path: Path) -> None:
    looks: list[object] = []
    with Claim(tmp_path / "out"), pytest.raises(BackendError, match="another job is writing it now"):
        compare(
            model, ["magnitude:2:4"], calibration=str(text), samples=2, sequence_length=16, output=tmp_path / "out",
            observe=looks.append,
        )  # fmt: skip
    assert not looks and not list(tmp_path.iterdir())


def test_passes_that_run_one_after_the_other(model: Path, text: Path) -> None:
    specs = split_specs("wanda:2:4,wanda:2:4+refine:epochs=1,rate=0.02,last=error,magnitude:50%")
    assert specs == ["wanda:2:4", "wanda:2:4+refine:epochs=1,rate=0.02,last=error", "magnitude:50%"]
    found = compare(model, specs, data=str(text), calibration=str(text), samples=8, sequence_length=32, windows=4)
    alone, refined = found.rows[1:3]
    assert refined.name == specs[1] and refined.kept == alone.kept and refined.errors.keys() == alone.errors.keys()
    assert refined.error is not None and alone.error is not None and refined.error < alone.error


def test_a_pipeline_that_takes_channels_out_cannot_be_compared(model: Path, text: Path) -> None:
    with pytest.raises(SparsifyError, match="comparing llm-pruner"):
        compare(model, ["llm-pruner:50%,importance=l2+refine"], calibration=str(text))
