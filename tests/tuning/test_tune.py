"""Recovery: zeros that hold, runs that go on where they stopped, and outputs that transformers loads."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import sparsify as command
from support.families import deep
from support.folders import load

import sparsify
from sparsify.backends.verify.adapter import verify_adapter
from sparsify.data.batches import example_batch
from sparsify.errors import BackendError, CalibrationError, CheckpointError, SparsifyError, SpecError, VerifyError
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.tuning.masks import check_masks, masks_of
from sparsify.tuning.network import build_network
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.state import TuneState
from sparsify.tuning.training import rate_share
from sparsify.tuning.tune import tune

pytest.importorskip("peft")
QUICK = Recipe(steps=6, batch=8, micro=4, samples=24, length=32, warmup=2, rate=2e-2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Token ids that count upwards, from 3 to 59 and again: easily learnt, and no tokenizer needed."""
    path = tmp_path_factory.mktemp("text") / "ids.safetensors"
    save_file({"input_ids": torch.arange(4000) % 57 + 3}, path)
    return str(path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one small block, in bfloat16 as real ones are."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    deep("llama", 1).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sparse(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, 2:4."""
    out = tmp_path_factory.mktemp("sparse") / "model"
    sparsify.compile(dense, ["magnitude:2:4"], output=out, evaluate=torch.arange(3, 35).view(2, 16))
    return out


def masks(folder: Path) -> dict[str, torch.Tensor]:
    source = open_source(folder)
    return masks_of(capture(source, example_batch(source)))


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    weights = open_source(folder).weights
    return {n: weights.read(n) == 0 for n in weights.parameters()}


def check_recovery(sparse: Path, text: str, out: Path, recipe: Recipe, blocks: int) -> None:
    """Zeros held and the loss fell; nothing else changed than what is trained; transformers loads the result."""
    result = tune(sparse, text, out, recipe)
    before, after = zeros(sparse), zeros(out)
    pruned = masks(sparse)
    assert len(pruned) == 7 * blocks == result.masked
    for name in pruned:
        assert bool((after[name] >= before[name]).all()), name
        groups = ~after[name].view(-1, 4)
        assert int(groups.sum(1).max()) <= 2, "2:4 still"
    assert result.perplexity[1] < 0.9 * result.perplexity[0] and len(result.losses) == recipe.steps
    one, other = (open_source(folder).weights for folder in (sparse, out))
    changed = {n for n in before if not torch.equal(one.read(n), other.read(n))}
    assert changed == set(pruned) if recipe.method == "lora" else set(pruned) < changed
    model = load(out)
    made = model.generate(torch.tensor([[5, 6]]), min_new_tokens=3, max_new_tokens=3, pad_token_id=0)
    assert made.shape == (1, 5)
    manifest = json.loads((out / "sparsify.json").read_text())
    assert manifest["tuned"]["steps"] == recipe.steps and manifest["passes"][0]["spec"] == "magnitude:2:4"
    assert not out.with_name(out.name + ".tuning").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_zeros_hold_and_the_loss_falls(sparse: Path, text: str, tmp_path: Path, method: Any) -> None:
    recipe = replace(QUICK, method=method, steps=12, rate=2e-2 if method == "lora" else 5e-3)
    check_recovery(sparse, text, tmp_path / "out", recipe, blocks=1)
    judged, tuned = (json.loads((made / "sparsify.json").read_text()) for made in (sparse, tmp_path / "out"))
    assert "evaluation" in judged and "evaluation" not in tuned, "what was judged are other weights"


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_real_model_recovers(bundled: Path, tmp_path: Path, method: Any) -> None:
    """The bundled model, on text through its tokenizer."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i}\n\nprint(f{i}({i} * 3))" for i in range(400)))
    sparsify.compile(bundled, ["magnitude:2:4"], output=tmp_path / "sparse")
    recipe = replace(QUICK, method=method, steps=12, rate=2e-3 if method == "lora" else 5e-4)
    check_recovery(tmp_path / "sparse", str(text), tmp_path / "out", recipe, blocks=6)


def test_lora_is_merged_as_it_was_trained(dense: Path, text: str, tmp_path: Path) -> None:
    """Of a dense model nothing is masked: merged and kept apart give one perplexity, but for bfloat16's rounding."""
    merged = tune(dense, text, tmp_path / "merged", QUICK)
    apart = tune(dense, text, tmp_path / "adapter", QUICK, adapter=True)
    assert merged.masked == 0 and merged.losses == apart.losses
    assert merged.perplexity[1] == pytest.approx(apart.perplexity[1], rel=0.02)
    assert merged.perplexity[1] < 0.9 * merged.perplexity[0], "nor is that because nothing was learnt"
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(dense), tmp_path / "adapter")
    assert model(torch.tensor([[1, 2]])).logits.shape[:2] == (1, 2)
    assert verify_adapter(tmp_path / "adapter").sound
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    problems = verify_adapter(tmp_path / "adapter").problems
    assert len(problems) == 1 and "its bytes are not those that were written" in problems[0]
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert len(verify_adapter(tmp_path / "adapter").problems) == 2


def test_another_backend_writes_it(sparse: Path, text: str, tmp_path: Path) -> None:
    """The tuned weights packed: what they unpack to are those that --to hf writes."""
    tune(sparse, text, tmp_path / "hf", QUICK)
    tune(sparse, text, tmp_path / "packed", QUICK, to="packed:choice=smallest")
    plain, packed = (open_source(tmp_path / f).weights for f in ("hf", "packed"))
    assert all(torch.equal(plain.read(n), packed.read(n)) for n in plain.parameters())
    assert "quantization_config" in json.loads((tmp_path / "packed" / "config.json").read_text())
    with pytest.raises(SpecError, match="a folder of peft's own form"):
        tune(sparse, text, tmp_path / "none", QUICK, to="packed", adapter=True)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(sparse: Path, text: str, tmp_path: Path) -> None:
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


def test_what_is_refused(sparse: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for change in ({"method": "magic"}, {"rank": 0}, {"batch": 6}, {"steps": 0}, {"rate": -1.0}, {"dropout": 1.0}):
        with pytest.raises(SpecError):
            replace(QUICK, **change)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="only LoRA"):
        tune(sparse, text, out, replace(QUICK, method="full"), adapter=True)
    with pytest.raises(CalibrationError, match="fewer than one step"):
        tune(sparse, text, out, replace(QUICK, samples=4))
    save_file({"input_ids": torch.arange(5)}, tmp_path / "short.safetensors")
    with pytest.raises(CalibrationError, match=r"held out.*: 1 tokens in all"):
        tune(sparse, str(tmp_path / "short.safetensors"), out, QUICK)
    out.mkdir()
    with pytest.raises(BackendError, match="exists"):
        tune(sparse, text, out, QUICK)
    assert list(out.iterdir()) == [] and not (tmp_path / "out.tuning").exists()
    out.rmdir()
    (tmp_path / "out.tuning").mkdir()
    (tmp_path / "out.tuning" / "mine.txt").write_text("")
    with pytest.raises(BackendError, match=r"replacing .*out.tuning: a folder with mine.txt in it"):
        tune(sparse, text, out, QUICK)


def test_a_mask_that_broke_is_found() -> None:
    kept = torch.tensor([[True, False]])
    check_masks({"w": torch.tensor([[1.0, 0.0]])}, {"w": kept})
    with pytest.raises(VerifyError, match="1 pruned weights"):
        check_masks({"w": torch.tensor([[1.0, 2.0]])}, {"w": kept})


def test_a_diverging_run_stops(sparse: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"a loss of|gradients that are NaN"):
        tune(sparse, text, tmp_path / "out", replace(QUICK, method="full", rate=1e30))
    assert not (tmp_path / "out").exists()


def test_at_the_command_line(sparse: Path, text: str, tmp_path: Path) -> None:
    words = (
        "tune",
        sparse,
        "--data",
        text,
        "-o",
        tmp_path / "out",
        "--steps",
        2,
        "--batch",
        4,
        "--samples",
        8,
        "--sequence-length",
        32,
    )
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert "2 steps, 256 tokens" in done.stdout and "the zeros of 7 weights were held" in done.stdout
    again = command(*words)
    assert again.returncode == 1 and "exists" in again.stderr
    assert math.isfinite(float(done.stdout.rpartition("→ ")[2].split()[0]))


@pytest.mark.parametrize(
    ("steps", "warmup", "rising"), [(100, 5, 5), (100, 10, 10), (100, 99, 10), (25, 100, 2), (6, 9, 1)]
)
def test_the_rate_rises_for_a_tenth_of_a_run_at_most_and_falls_to_nothing(steps: int, warmup: int, rising: int) -> None:
    shares = [rate_share(step, steps, warmup) for step in range(steps)]
    assert shares[:rising] == pytest.approx([(i + 1) / rising for i in range(rising)])
    assert shares.index(max(shares)) in (rising - 1, rising) and max(shares) == 1
    falling = [(steps - step) / (steps - rising) for step in range(rising, steps)]
    assert shares[rising:] == pytest.approx(falling) and shares[-1] == pytest.approx(1 / (steps - rising))
    assert rate_share(0, steps, 0) == 1


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    one, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 6)
    optimizer = torch.optim.AdamW(one.parameters())
    one(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with TuneState.of(tmp_path / "out", QUICK, one, resume=False) as state:
        state.save(optimizer)
    with TuneState.of(tmp_path / "out", QUICK, torch.nn.Linear(4, 4), resume=True) as state:
        assert state.step == 0
    refused = pytest.raises(CheckpointError, match=r"no weight of that shape\. Is it another model's state")
    with refused, TuneState.of(tmp_path / "out", QUICK, other, resume=True):
        pass


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "nested", "another", "a folder"])
def test_a_damaged_state_is_refused(tmp_path: Path, file: str, how: str) -> None:
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with TuneState.of(tmp_path / "out", QUICK, layer, resume=False) as state:
        state.save(optimizer)
    with TuneState.of(tmp_path / "out", QUICK, torch.nn.Linear(4, 4), resume=True) as state:
        assert state.folder == tmp_path / "out.tuning"
    path = tmp_path / "out.tuning" / file
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x80
    spoilt = {
        "flipped": bytes(content),
        "cut": path.read_bytes()[:-1].rstrip(b"}"),
        "emptied": b"",
        "nested": b"[" * 100_000,
        "another": b'{"recipe": {}, "digests": []}',
    }
    if how in spoilt:
        path.write_bytes(spoilt[how])
    else:
        path.unlink()
        path.mkdir()
    # A folder in a file's place makes it a folder that may be somebody else's: it is not replaced.
    refused = pytest.raises(SparsifyError, match=r"^(resuming from .*Begin without --resume|replacing .* delete it)")
    with refused, TuneState.of(tmp_path / "out", QUICK, layer, resume=True):
        pass


def test_lora_without_peft_is_refused(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SpecError, match="the package peft is not installed"):
        build_network(open_source(dense), QUICK, torch.device("cpu"))
    network, trained = build_network(open_source(dense), replace(QUICK, method="full"), torch.device("cpu"))
    assert trained is network
