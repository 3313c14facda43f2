"""Recovery: zeros that hold, runs that go on where they stopped, and outputs that transformers loads."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import load

import sparsify
from sparsify.errors import BackendError, CalibrationError, CheckpointError, SpecError, VerifyError
from sparsify.frontend.source import open_source
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.tune import check_masks, masks_of, tune

pytest.importorskip("peft")
QUICK = Recipe(steps=6, batch=8, micro=4, samples=24, length=32, warmup=2, rate=2e-3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i}\n\nprint(f{i}({i} * 3))" for i in range(400)))
    return str(path)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, 2:4."""
    out = tmp_path_factory.mktemp("sparse") / "model"
    bundled = Path(__file__).parents[2] / "models" / "pycode-6m"
    sparsify.compile(bundled, ["magnitude:2:4"], output=out)
    return out


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    weights = open_source(folder).weights
    return {n: weights.read(n) == 0 for n in weights.parameters()}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_zeros_hold_and_the_loss_falls(sparse: Path, text: str, tmp_path: Path, method: Any) -> None:
    recipe = replace(QUICK, method=method, steps=12, rate=2e-3 if method == "lora" else 5e-4)
    result = tune(sparse, text, tmp_path / "out", recipe)
    before, after = zeros(sparse), zeros(tmp_path / "out")
    pruned = masks_of(open_source(sparse))
    assert len(pruned) == 42 == result.masked
    for name in pruned:
        assert bool((after[name] >= before[name]).all()), name
        groups = ~after[name].view(-1, 4)
        assert int(groups.sum(1).max()) <= 2, "2:4 still"
    assert result.perplexity[1] < 0.9 * result.perplexity[0] and len(result.losses) == 12
    changed = [n for n in before if not torch.equal(open_source(sparse).weights.read(n),
                                                    open_source(tmp_path / "out").weights.read(n))]  # fmt: skip
    assert set(changed) == set(pruned) if method == "lora" else set(pruned) < set(changed)
    model = load(tmp_path / "out")
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, pad_token_id=0).shape == (1, 5)
    manifest = json.loads((tmp_path / "out" / "sparsify.json").read_text())
    assert manifest["tuned"]["steps"] == 12 and manifest["passes"][0]["spec"] == "magnitude:2:4"
    assert not (tmp_path / "out.tuning").exists()


def test_lora_is_merged_as_it_was_trained(sparse: Path, text: str, tmp_path: Path) -> None:
    """Of a dense model nothing is masked: merged and kept apart give one perplexity, but for bfloat16's rounding."""
    dense = tmp_path / "dense"
    shutil.copytree(Path(__file__).parents[2] / "models" / "pycode-6m", dense)
    merged = tune(dense, text, tmp_path / "merged", QUICK)
    apart = tune(dense, text, tmp_path / "adapter", QUICK, adapter=True)
    assert merged.masked == 0 and merged.losses == apart.losses
    assert merged.perplexity[1] == pytest.approx(apart.perplexity[1], rel=0.02)
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(dense), tmp_path / "adapter")
    assert model(torch.tensor([[1, 2]])).logits.shape[:2] == (1, 2)


def test_a_run_goes_on_where_it_stopped(
    sparse: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(sparse, text, tmp_path / "whole", replace(QUICK, dropout=0.0))

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    recipe = replace(QUICK, dropout=0.0)
    with pytest.raises(KeyboardInterrupt):
        tune(sparse, text, tmp_path / "parts", recipe, save_every=3, observe=stop)
    assert not (tmp_path / "parts").exists() and (tmp_path / "parts.tuning" / "state.json").exists()
    with pytest.raises(CheckpointError, match="another rank"):
        tune(sparse, text, tmp_path / "parts", replace(recipe, rank=4), resume=True)
    seen: list[int] = []
    parts = tune(
        sparse, text, tmp_path / "parts", recipe, resume=True, observe=lambda step, of, loss: seen.append(step)
    )
    assert seen == [4, 5, 6] and parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for name in open_source(sparse).weights.parameters():
        one, other = (open_source(tmp_path / f).weights.read(name).float() for f in ("whole", "parts"))
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
    with pytest.raises(CheckpointError, match="no state to read"):
        tune(sparse, text, tmp_path / "fresh", recipe, resume=True)


def test_time_is_up(sparse: Path, text: str, tmp_path: Path) -> None:
    result = tune(sparse, text, tmp_path / "out", replace(QUICK, steps=1000, minutes=1e-9))
    assert result.steps == 0 and result.perplexity[1] == pytest.approx(result.perplexity[0], rel=1e-3)


def test_what_is_refused(sparse: Path, text: str, tmp_path: Path, folder: Any) -> None:
    out = tmp_path / "out"
    for change in ({"method": "magic"}, {"rank": 0}, {"batch": 6}, {"steps": 0}, {"rate": -1.0}, {"dropout": 1.0}):
        with pytest.raises(SpecError):
            replace(QUICK, **change)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="only LoRA"):
        tune(sparse, text, out, replace(QUICK, method="full"), adapter=True)
    with pytest.raises(CalibrationError, match="fewer than one step"):
        tune(sparse, text, out, replace(QUICK, samples=4))
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(CalibrationError):
        tune(sparse, str(tmp_path / "short.txt"), out, QUICK)
    out.mkdir()
    with pytest.raises(BackendError, match="exists"):
        tune(sparse, text, out, QUICK)
    assert list(out.iterdir()) == [] and not (tmp_path / "out.tuning").exists()


def test_a_mask_that_broke_is_found() -> None:
    kept = torch.tensor([[True, False]])
    check_masks({"w": torch.tensor([[1.0, 0.0]])}, {"w": kept})
    with pytest.raises(VerifyError, match="1 pruned weights"):
        check_masks({"w": torch.tensor([[1.0, 2.0]])}, {"w": kept})


def test_a_diverging_run_stops(sparse: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="a loss of"):
        tune(sparse, text, tmp_path / "out", replace(QUICK, method="full", rate=1e30))
    assert not (tmp_path / "out").exists()


def test_at_the_command_line(sparse: Path, text: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sparsify", "tune", str(sparse), "--data", text, "-o", str(tmp_path / "out"),
             "--steps", "2", "--batch", "4", "--samples", "8", "--sequence-length", "32"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 steps, 256 tokens" in done.stdout and "the zeros of 42 weights were held" in done.stdout
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "exists" in again.stderr
    assert math.isfinite(float(done.stdout.rpartition("→ ")[2].split()[0]))
