"""Distillation from a teacher, zeros held; what a teacher is refused for; LoRA on named layers; text in both parts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.families import deep, save
from support.folders import load
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import sparsify
from sparsify.errors import CalibrationError, CheckpointError, SpecError, TraceError
from sparsify.frontend.source import open_source
from sparsify.method import divergence as mathematics
from sparsify.method.divergence import divergence
from sparsify.tuning.overlap import apart
from sparsify.tuning.recipe import Recipe
from sparsify.tuning.targets import find_targets
from sparsify.tuning.tune import tune

pytest.importorskip("peft")
QUICK = Recipe(steps=10, batch=8, micro=4, samples=24, length=32, warmup=2, rate=2e-2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "ids.safetensors"
    save_file({"input_ids": torch.randint(3, 60, (4000,), generator=torch.Generator().manual_seed(0))}, path)
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense``, whose weights are large enough to say something, and the same at 2:4."""
    folder = tmp_path_factory.mktemp("models")
    model = deep("llama", 2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    model.save_pretrained(folder / "dense")
    sparsify.compile(folder / "dense", ["magnitude:2:4"], output=folder / "sparse")
    return folder


def kl(student: Path, teacher: Path) -> float:
    ids = torch.randint(3, 60, (8, 32), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        ours, theirs = (torch.log_softmax(load(f)(ids).logits, -1) for f in (student, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_divergence_falls_and_zeros_hold(models: Path, text: str, tmp_path: Path, method: Any) -> None:
    recipe = replace(QUICK, distill=1.0, method=method, dropout=0.0, rate=2e-2 if method == "lora" else 5e-3)
    result = tune(models / "sparse", text, tmp_path / "out", recipe, teacher=models / "dense")
    assert kl(tmp_path / "out", models / "dense") < 0.9 * kl(models / "sparse", models / "dense")
    assert result.losses[-1] < result.losses[0]
    one, other = (open_source(f).weights for f in (models / "sparse", tmp_path / "out"))
    pruned = [n for n in one.parameters() if "_proj" in n]
    assert all(bool(((one.read(n) != 0) | (other.read(n) == 0)).all()) for n in pruned) and len(pruned) == 14
    said = json.loads((tmp_path / "out" / "sparsify.json").read_text())["tuned"]["teacher"]
    assert said["name"] == "dense" and len(said["blake2b-256"]) == 64 and "pruned" not in said


def test_the_first_loss_is_the_divergence_itself(models: Path, text: str, tmp_path: Path) -> None:
    """Of what the teacher gives when it is run by transformers, on the sequences of the first step."""
    seen: list[torch.Tensor] = []
    recipe = replace(QUICK, distill=1.0, method="full", steps=1, batch=24)
    result = tune(models / "sparse", text, tmp_path / "out", recipe, teacher=models / "dense")
    from sparsify.data.batches import load_calibration

    source = open_source(models / "sparse")
    drawn = load_calibration(text, source, samples=24, sequence_length=32, seed=0, both=True)
    seen = [batch["input_ids"] for batch in drawn.batches]
    with torch.no_grad():
        ours, theirs = (torch.log_softmax(load(models / f)(torch.cat(seen)).logits, -1) for f in ("sparse", "dense"))
    want = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert result.losses[0] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_the_gradient_is_autograds(share: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "CHUNK", chunk)
    torch.manual_seed(0)
    logits, taught = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    ids = torch.randint(0, 7, (2, 5))
    loss = divergence(logits, lambda row: taught[row], ids=ids, share=share)
    (found,) = torch.autograd.grad(loss, logits)
    ours, theirs = torch.log_softmax(logits, -1), torch.log_softmax(taught, -1)
    text = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    want = share * (theirs.exp() * (theirs - ours)).sum(-1).mean() + (1 - share) * text
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(found, torch.autograd.grad(want, logits)[0])


@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_padding_teaches_nothing_whatever_stands_there(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "CHUNK", chunk)
    torch.manual_seed(0)
    logits, taught, counted = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.rand(2, 5) < 0.6
    logits[~counted] = float("nan")
    logits.requires_grad_()
    loss = divergence(logits, lambda row: taught[row], counted=counted)
    (found,) = torch.autograd.grad(loss, logits)
    ours, theirs = torch.log_softmax(logits[counted], -1), torch.log_softmax(taught[counted], -1)
    want = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    torch.testing.assert_close(loss, want)
    # Of rows that are not counted autograd's is 0 too.
    torch.testing.assert_close(found, torch.autograd.grad(want, logits)[0])
    with torch.no_grad():
        torch.testing.assert_close(divergence(logits, lambda row: taught[row], counted=counted), want)
    none = torch.zeros(2, 5, dtype=torch.bool)
    assert divergence(logits, lambda row: taught[row], counted=none).item() == 0


def test_teachers_that_cannot_teach(models: Path, text: str, tmp_path: Path) -> None:
    wide = deep("llama", 1)
    wide.resize_token_embeddings(80)
    wide.save_pretrained(tmp_path / "wide")
    broken = deep("llama", 1)
    broken.model.norm.weight.data.fill_(3e38)
    broken.lm_head.weight.data.mul_(1000)
    broken.save_pretrained(tmp_path / "broken")
    save("t5", tmp_path / "t5")
    out = tmp_path / "out"
    for name, kind, words in (
        (models / "sparse", SpecError, "the very weights that are tuned, as pruned as they are"),
        (tmp_path / "wide", SpecError, "a vocabulary of 80 tokens, and 64"),
        (tmp_path / "broken", CalibrationError, "perplexity of broken"),
        (tmp_path / "t5", TraceError, "not a causal language model"),
        (tmp_path / "none", CheckpointError, "none"),
    ):
        with pytest.raises(kind, match=words):
            tune(models / "sparse", text, out, QUICK, teacher=name)
    with pytest.raises(SpecError, match="no teacher"):
        tune(models / "sparse", text, out, replace(QUICK, distill=0.5))
    assert not out.exists() and not (tmp_path / "out.tuning").exists()


@pytest.mark.slow
def test_of_a_teacher_with_rows_of_padding_the_others_are_learnt(text: str, tmp_path: Path) -> None:
    """The same tokens in a wider head: as if the teacher had none of the further rows, whatever they say."""
    words = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    vocabulary = {f"w{number}": number for number in range(64)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "w3")), **words)
    dense, wide, large = deep("llama", 2), deep("llama", 2), deep("llama", 2)
    wide.resize_token_embeddings(80)
    with torch.no_grad():
        wide.lm_head.weight[64:] = 5 * torch.randn(16, 32)
    large.resize_token_embeddings(80)
    for name, model in {"dense": dense, "wide": wide, "large": large}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    sparsify.compile(tmp_path / "dense", ["magnitude:2:4"], output=tmp_path / "sparse")
    found = {
        name: tune(
            tmp_path / "sparse", text, tmp_path / f"by-{name}", replace(QUICK, distill=1.0), teacher=tmp_path / name
        )
        for name in ("dense", "wide")
    }
    assert found["wide"].losses == pytest.approx(found["dense"].losses, rel=1e-5)
    assert found["wide"].teacher["predictions"] == [80, 64] and "predictions" not in found["dense"].teacher
    # Where the model that is tuned is the wider one, the teacher says nothing of its further rows.
    sparsify.compile(tmp_path / "large", ["magnitude:2:4"], output=tmp_path / "larger")
    with pytest.raises(SpecError, match="predictions over 64 tokens, and 80 in the model that is tuned"):
        tune(tmp_path / "larger", text, tmp_path / "out", QUICK, teacher=tmp_path / "dense")
    # Nor is a head of fewer rows than the tokenizer has tokens one with padding.
    tokenizer.add_tokens([f"more{number}" for number in range(8)])
    for name in ("sparse", "wide"):
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(SpecError, match="predictions over 80 tokens, and 64"):
        tune(tmp_path / "sparse", text, tmp_path / "out", QUICK, teacher=tmp_path / "wide", check=False)
    assert not (tmp_path / "out").exists()


def test_numbers_of_the_teacher_that_are_none_are_told(models: Path, tmp_path: Path) -> None:
    """Its perplexity is a number, for the held-out text has no token 61; what is trained on has."""
    ids = torch.randint(3, 60, (4000,), generator=torch.Generator().manual_seed(0))
    ids[:3000:7] = 61
    text = tmp_path / "ids.safetensors"
    save_file({"input_ids": ids}, text)
    hidden, predicted = deep("llama", 2), deep("llama", 2)
    hidden.model.embed_tokens.weight.data[61] = torch.nan
    with torch.no_grad():
        # A direction that only token 61 has, through which its logits overflow.
        predicted.model.embed_tokens.weight[:, 0] = 0
        predicted.model.embed_tokens.weight[61, 0] = 1
        for layer in predicted.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        predicted.model.norm.weight[0] = 1e20
        predicted.lm_head.weight[:, 0] = 1e20
    out = tmp_path / "out"
    for model, words in (
        (
            hidden,
            r"distilling from \S*: hidden values of the teacher that are NaN or infinite in sequence \d+, and in \d+",
        ),
        (predicted, r"distilling from \S*, step 1: logits of the teacher that are NaN or infinite in sequence \d+"),
    ):
        model.save_pretrained(tmp_path / "teacher")
        with pytest.raises(CalibrationError, match=words + ".*Give another teacher; float16 ends at 65504"):
            tune(models / "sparse", str(text), out, QUICK, teacher=tmp_path / "teacher", allow_nan=True)
        assert not out.exists()


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_teacher_data_and_model_alone(models: Path, text: str, tmp_path: Path) -> None:
    recipe, out = replace(QUICK, dropout=0.0, steps=6), tmp_path / "parts"
    whole = tune(models / "sparse", text, tmp_path / "whole", recipe, teacher=models / "dense")

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(models / "sparse", text, out, recipe, save_every=3, observe=stop, teacher=models / "dense")
    with pytest.raises(CheckpointError, match=r"a run with another teacher[.]"):
        tune(models / "sparse", text, out, recipe, resume=True)
    with pytest.raises(CheckpointError, match="another targets"):
        tune(models / "sparse", text, out, replace(recipe, targets="q"), resume=True, teacher=models / "dense")
    save_file({"input_ids": torch.arange(4000) % 50 + 3}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"a run with another data[.]"):
        tune(models / "sparse", str(tmp_path / "other.safetensors"), out, recipe, resume=True, teacher=models / "dense")
    sparsify.compile(models / "dense", ["magnitude:1:4"], output=tmp_path / "sparser")
    with pytest.raises(CheckpointError, match=r"a run with another model[.]"):
        tune(tmp_path / "sparser", text, out, recipe, resume=True, teacher=models / "dense")
    parts = tune(models / "sparse", text, out, recipe, resume=True, teacher=models / "dense")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)


def test_lora_on_queries_and_values_alone(models: Path, text: str, tmp_path: Path) -> None:
    result = tune(models / "sparse", text, tmp_path / "out", replace(QUICK, targets="q,v"))
    one, other = (open_source(f).weights for f in (models / "sparse", tmp_path / "out"))
    changed = {n.split(".")[-2] for n in one.parameters() if not torch.equal(one.read(n), other.read(n))}
    assert changed == {"q_proj", "v_proj"}
    said = json.loads((tmp_path / "out" / "sparsify.json").read_text())["tuned"]
    assert said["recipe"]["targets"] == "q,v" and said["layers"] == list(result.layers)
    with pytest.raises(SpecError, match="targets are what LoRA is put on"):
        replace(QUICK, targets="q", method="full")
    with pytest.raises(SpecError, match="names no linear layer"):
        tune(models / "sparse", text, tmp_path / "none", replace(QUICK, targets="lm_head"))


def test_what_targets_name() -> None:
    llama = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]
    assert find_targets(llama, ["*q_proj", "*v_proj"]) == find_targets(llama, ["q", "v"])
    assert find_targets(llama, ["model.layers.1"]) == llama[4:] and find_targets(llama, ["o_proj"]) == [*llama[3::4]]
    assert find_targets(["block.0.SelfAttention.q", "block.0.x.wi"], ["q"]) == ["block.0.SelfAttention.q"]
    assert find_targets(["layer.0.self.query", "layer.0.self.key"], ["q"]) == ["layer.0.self.query"]
    for fused in ("c_attn", "qkv_proj", "Wqkv", "query_key_value"):
        with pytest.raises(
            SpecError, match=rf"queries and keys and values in one layer, h.0.{fused}.*--targets {fused}"
        ):
            find_targets([f"h.0.{fused}"], ["q"])
    with pytest.raises(SpecError, match="Name some of k_proj, o_proj, q_proj, v_proj"):
        find_targets(llama, ["*up_proj"])


def test_text_that_is_validated_on_is_not_trained_on(models: Path, text: str, tmp_path: Path) -> None:
    """A copy is shared out as the file itself; what is contained in the other is left out."""
    ids = torch.randint(3, 60, (4000,), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "copy.safetensors")
    save_file({"input_ids": ids[1000:2000]}, tmp_path / "part.safetensors")
    recipe = replace(QUICK, steps=1, samples=40)
    copied = tune(models / "sparse", text, tmp_path / "a", recipe, validation=str(tmp_path / "copy.safetensors"))
    assert "its first 90%" in copied.data and "held out" in copied.validation and copied.left_out == 0
    held = tune(models / "sparse", text, tmp_path / "b", recipe, validation=str(tmp_path / "part.safetensors"))
    assert 3 <= held.left_out < 25
    save_file({"input_ids": ids[100:1000]}, tmp_path / "part.safetensors")
    with pytest.raises(CalibrationError, match="of them stand in the text that is validated on"):
        tune(models / "sparse", str(tmp_path / "part.safetensors"), tmp_path / "c", recipe, validation=text)
    repeated = torch.arange(40).repeat(5)
    assert apart(repeated[:64][None], repeated[None]).tolist() == [True], "what the text itself repeats is no sign"


@pytest.mark.slow
def test_a_dense_teacher_recovers_a_real_model(stories: Path, tmp_path: Path) -> None:
    data = stories.parents[1] / "data" / "stories"
    if not data.exists():
        pytest.skip("shared/data/stories is not here")
    train, held = str(data / "calibration.txt"), str(data / "heldout.txt")
    sparsify.compile(stories, ["wanda:2:4"], calibration=train, samples=16, output=tmp_path / "sparse")
    recipe = Recipe(method="full", rate=1e-3, steps=20, batch=16, samples=320, length=128)
    result = tune(tmp_path / "sparse", train, tmp_path / "out", recipe, validation=held, teacher=stories)
    assert result.teacher is not None and result.teacher["perplexity"] < 4
    assert result.teacher["perplexity"] < result.perplexity[1] < 0.3 * result.perplexity[0]
    one, other = (open_source(f).weights for f in (tmp_path / "sparse", tmp_path / "out"))
    pruned = [n for n in one.parameters() if "_proj" in n]
    assert len(pruned) == 35 and all(bool(((one.read(n) != 0) | (other.read(n) == 0)).all()) for n in pruned)
