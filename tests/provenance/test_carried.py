"""What a manifest keeps when its folder becomes another: nothing that is not true of the new numbers, or their form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import sparsify as command
from support.families import deep

import sparsify
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.backends.verify.checkpoint import verify_checkpoint
from sparsify.errors import BackendError
from sparsify.files.manifest import read_manifest
from sparsify.frontend.source import open_source
from sparsify.provenance.figures import figures_of
from sparsify.quality.heldout import with_use
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.tune import tune

QUICK = Recipe(steps=2, batch=4, micro=4, samples=8, length=16, warmup=0, method="full", rate=1e-2)
SMALLEST = "packed:choice=smallest"
JUDGE = torch.arange(3, 35).view(2, 16)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "ids.safetensors"
    save_file({"input_ids": torch.arange(4000) % 57 + 3}, path)
    return str(path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    deep("llama", 1).save_pretrained(folder)
    (folder / "README.md").write_text("the dense model's own")
    return folder


@pytest.fixture(scope="module")
def searched(dense: Path, ids: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a search, whose manifest has the trials and both perplexities."""
    out = tmp_path_factory.mktemp("searched") / "out"
    words: dict[str, Any] = {"samples": 4, "sequence_length": 32, "windows": 4}
    sparsify.search(dense, "magnitude", budget="perplexity<=1.1", data=ids, output=out, **words)
    return out


def test_what_is_tuned_keeps_no_figure_of_the_numbers_before(searched: Path, ids: str, tmp_path: Path) -> None:
    assert read_manifest(searched).keys() >= {"search", "recipe"} and len(figures_of(read_manifest(searched))) == 1
    done = tune(searched, ids, tmp_path / "tuned", QUICK)
    said = read_manifest(tmp_path / "tuned")
    assert not {"search", "recipe", "evaluation"} & said.keys()
    (only,) = figures_of(said)
    assert (only.before, only.after) == done.perplexity
    assert [run["command"] for run in said["history"]] == ["compile", "tune"] and "recipe" in said["history"][0]
    weights = open_source(tmp_path / "tuned").weights
    every = [weights.read(name) for name in weights.parameters()]
    left = sum(int(tensor.count_nonzero()) for tensor in every) / sum(tensor.numel() for tensor in every)
    assert said["history"][-1]["whole"]["kept"] == left
    done_so = command("compile", "--recipe", tmp_path / "tuned", "-o", tmp_path / "again")
    assert done_so.returncode == 2 and "no 'recipe' in it: tuned" in done_so.stderr


def test_what_is_tuned_keeps_what_its_zeros_are(dense: Path, ids: str, tmp_path: Path) -> None:
    """Which they are, by what and on which data: of a packed folder too, whose form the new one does not have."""
    first = tmp_path / "packed"
    sparsify.compile(dense, "wanda:2:4", calibration=ids, samples=4, sequence_length=32, output=first, to=SMALLEST)
    before = read_manifest(first)
    tune(first, ids, tmp_path / "tuned", QUICK)
    said = read_manifest(tmp_path / "tuned")
    assert "packed" in before and not {"packed", "not_packed"} & said.keys()
    assert said["passes"] == before["passes"] and said["calibration"] == before["calibration"]
    assert verify_checkpoint(tmp_path / "tuned").sound
    label = before["calibration"]["data"]
    assert "on which the model was calibrated" in with_use(label, ids, open_source(tmp_path / "tuned"))


def test_a_folder_whose_weights_were_not_worth_packing(dense: Path, ids: str, tmp_path: Path) -> None:
    sparsify.compile(dense, "magnitude:5%", output=tmp_path / "out", to="packed")
    assert "not_packed" in read_manifest(tmp_path / "out")
    tune(tmp_path / "out", ids, tmp_path / "tuned", QUICK)
    assert "not_packed" not in read_manifest(tmp_path / "tuned")


def test_a_dense_model_that_is_tuned_has_nothing_to_pack(dense: Path, ids: str, tmp_path: Path) -> None:
    """And no manifest, over which nothing stumbles."""
    with pytest.raises(BackendError, match="no weight is worth packing"):
        tune(dense, ids, tmp_path / "tuned", QUICK, to="packed")
    tune(dense, ids, tmp_path / "tuned", QUICK)
    assert read_manifest(tmp_path / "tuned")["passes"] == []


def test_pruned_again_and_unpacked(searched: Path, tmp_path: Path) -> None:
    """A compile begins anew; the same numbers in another form are as good as they were."""
    sparsify.compile(searched, "magnitude:90%", output=tmp_path / "more", to=SMALLEST, evaluate=JUDGE)
    more = read_manifest(tmp_path / "more")
    assert "search" not in more and {"evaluation", "packed"} <= more.keys()
    unpack_folder(tmp_path / "more", tmp_path / "plain")
    plain = read_manifest(tmp_path / "plain")
    assert "packed" not in plain and plain["evaluation"] == more["evaluation"]


def test_a_result_that_is_saved_once_more_in_another_form(dense: Path, tmp_path: Path) -> None:
    """As the compile would have written it: its own form, its own card, its own recipe."""
    made = sparsify.compile(dense, "magnitude:2:4", output=tmp_path / "packed", to=SMALLEST)
    assert "packed" in made.manifest
    made.save(tmp_path / "plain")
    sparsify.compile(dense, "magnitude:2:4", output=tmp_path / "straight")
    said, straight = read_manifest(tmp_path / "plain"), read_manifest(tmp_path / "straight")
    for one in (said, straight):
        one["history"][0].pop("date")
        one["digests"].pop("manifest")
        one["digests"]["files"].pop("README.md")  # has the date's digest of nothing, but its command names OUT
    assert said == straight
    assert (tmp_path / "plain" / "README.dense.md").read_text() == "the dense model's own"
    made.save(tmp_path / "smallest", to=SMALLEST)
    assert read_manifest(tmp_path / "smallest")["recipe"]["to"] == SMALLEST
