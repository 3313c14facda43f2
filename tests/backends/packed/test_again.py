"""A folder that was packed on another machine: what is clearly slower packed on this one runs dense."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import SMALLEST, load

import sparsify
from sparsify.backends.packed.loaded import again
from sparsify.backends.packed.loaded.linear import PackedLinear
from sparsify.backends.packed.unpack import unpack_folder
from sparsify.errors import CheckpointError
from sparsify.runtime.cache import cache_folder
from sparsify.runtime.cpu.build import source_hash
from sparsify.runtime.cpu.stopwatch import Stopwatch

OTHER = {"processor": "Another One", "instructions": "avx2"}
Races = list[tuple[int, int]]


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Races:
    """Where packed products of 64 rows gain, and others lose: the shapes that were timed, into a cache of their own."""
    timed: Races = []

    def race(self: Stopwatch, calls: list[Any]) -> list[float]:
        found = calls[0]()
        timed.append(tuple(found.shape))
        return [1.0, 2.0, 0.5 if found.shape[-1] == 64 else 3.0][: len(calls)]

    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Stopwatch, "race", race)
    return timed


@pytest.fixture
def folder_of_another(folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packed where everything gained, by a machine that is not this one."""
    with monkeypatch.context() as there:
        there.setattr(again, "this_machine", lambda: OTHER)
        there.setattr("sparsify.backends.packed.job.this_machine", lambda: OTHER)
        there.setattr(Stopwatch, "race", lambda self, calls: [1.0, 2.0, 0.5][: len(calls)])
        there.setenv("SPARSIFY_CACHE", str(tmp_path / "theirs"))
        sparsify.compile(folder("llama"), ["magnitude:2:4"], output=tmp_path / "out", to="packed")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert all(isinstance(m, PackedLinear) for n, m in load(tmp_path / "out").named_modules() if "_proj" in n)
    return tmp_path / "out"


def test_where_it_is_loaded_it_is_chosen_again(folder_of_another: Path, races: Races, tmp_path: Path) -> None:
    said = json.loads((folder_of_another / "config.json").read_text())["quantization_config"]
    assert said["measured"] == OTHER
    with pytest.warns(RuntimeWarning, match=r"10 of 14 packed weights run dense here, .* Another One, avx2"):
        model = load(folder_of_another)
    packed = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed == {"gate_proj", "up_proj"}
    # The second time everything is known; and the answers are those of the folder.
    timed = len(races)
    with pytest.warns(RuntimeWarning, match="run dense here"):
        again_loaded = load(folder_of_another)
    dense = [shape for shape in races[timed:] if shape[0] != 1]
    assert not dense, "no packed product was timed twice"
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    unpack_folder(folder_of_another, tmp_path / "dense")
    exact = load(tmp_path / "dense")(ids).logits
    for each in (model, again_loaded):
        torch.testing.assert_close(each(ids).logits, exact, rtol=1e-4, atol=1e-5)
    # Saved, it is what it was made into.
    model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        torch.testing.assert_close(load(tmp_path / "saved")(ids).logits, exact, rtol=1e-4, atol=1e-5)
    sites = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["sites"]
    assert len(sites) == 4 and all("gate_proj" in n or "up_proj" in n for n in sites)


def test_where_everything_is_slower_one_stays_packed(
    folder_of_another: Path, races: Races, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stopwatch, "race", lambda self, calls: [1.0, 2.0, 3.0][: len(calls)])
    with pytest.warns(RuntimeWarning, match="13 of 14 packed weights run dense here"):
        model = load(folder_of_another)
    assert len(model.config.quantization_config.sites) == 1


def test_one_packed_for_size_stays_as_it_is(folder: Callable[[str], Path], races: Races, tmp_path: Path) -> None:
    sparsify.compile(folder("llama"), ["magnitude:2:4"], output=tmp_path / "out", to=SMALLEST)
    assert "measured" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(tmp_path / "out")
    assert len(model.config.quantization_config.sites) == 14


@pytest.mark.parametrize("cached", [b"{", b"[]", b'{"of": 3, "slower": {"x": 1}}', b"\xff"])
def test_a_damaged_cache_is_measured_again(folder_of_another: Path, races: Races, cached: bytes) -> None:
    place = cache_folder()
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    (place / "choice.json").write_bytes(cached)
    with pytest.warns(RuntimeWarning, match="10 of 14"):
        load(folder_of_another)
    assert json.loads((place / "choice.json").read_bytes())["of"] == {**again.this_machine(), **_versions()}


def _versions() -> dict[str, str]:
    return {"kernels": source_hash(), "torch": torch.__version__}


@pytest.mark.parametrize("measured", ["here", {"processor": "a"}, {"processor": 1, "instructions": "avx2"}])
def test_a_damaged_measured_is_refused(folder_of_another: Path, measured: object) -> None:
    path = folder_of_another / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["measured"] = measured
    path.write_text(json.dumps(config))
    (folder_of_another / "sparsify.json").unlink()
    with pytest.raises(CheckpointError, match="measured"):
        load(folder_of_another)
