"""A config says that parameters are one, the file holds several tensors: what transformers loads is what is opened."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.families import LLAMA, build, inputs, run
from support.folders import load

import sparsify
from sparsify.errors import CheckpointError
from sparsify.frontend import ties
from sparsify.frontend.source import open_source
from sparsify.ir.store import MemoryStore

TINY = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "max_position_embeddings": 32}  # fmt: skip


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    if kind == "bart":
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**TINY))
    if kind == "llava":
        text = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
        vision = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                               num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=3, tie_word_embeddings=True
        )
        return transformers.LlavaForConditionalGeneration(config)
    return build(kind)


GROUPS = {
    "llama": ["model.embed_tokens.weight", "lm_head.weight"],
    "gpt2": ["transformer.wte.weight", "lm_head.weight"],
    "bert": ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
    "t5": ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"],
    "bart": ["model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight",
             "lm_head.weight"],
    "llava": ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"],
}  # fmt: skip


def with_tensors(kind: str, folder: Path, held: dict[str, float | None]) -> Path:
    """The model's folder in which each tensor of ``held`` is the embedding times that number, or not there (None)."""
    model = model_of(kind)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = [name for name in held if name in tensors]
    base = tensors[names[0]].clone()
    for name, factor in held.items():
        tensors.pop(name, None)
        if factor is not None:
            tensors[name] = base * factor
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def compared(folder: Path) -> None:
    """What sparsify loads is what transformers loads: every tensor, and which of them are one."""
    theirs, ours = load(folder), sparsify.load(folder)
    state, own = theirs.state_dict(), ours.state_dict()
    assert state.keys() == own.keys()
    assert [name for name in state if not torch.equal(state[name], own[name])] == []
    assert ties.tied_names(theirs) == ties.tied_names(ours)


CASES = [
    (kind, factors)
    for kind, names in GROUPS.items()
    for factors in product((None, 1.0, 5.0), repeat=len(names))
    if any(factors) and (len(names) == 2 or factors.count(None) < 3)
]
# Of those of encoder-decoders, which have four names, every ninth.
CHOSEN = [case for number, case in enumerate(CASES) if len(case[1]) == 2 or number % 9 == 0]


@pytest.mark.first(16)
@pytest.mark.parametrize(("kind", "factors"), CHOSEN)
def test_what_transformers_ties_is_tied(kind: str, factors: tuple[float | None, ...], tmp_path: Path) -> None:
    compared(with_tensors(kind, tmp_path, dict(zip(GROUPS[kind], factors, strict=True))))


def test_a_tied_bias(tmp_path: Path) -> None:
    names = ["cls.predictions.bias", "cls.predictions.decoder.bias"]
    for number, factors in enumerate([(1.0, 1.0), (1.0, 5.0), (1.0, None), (None, 1.0)]):
        compared(with_tensors("bert", tmp_path / str(number), dict(zip(names, factors, strict=True))))


def test_numbers_are_compared_and_not_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minus zero is zero, bfloat16 may say what float32 says, and a difference may be the last of many."""
    folder = with_tensors("llama", tmp_path, dict.fromkeys(GROUPS["llama"], 1.0))
    monkeypatch.setattr(ties, "_PIECE", 64)
    path, (one, other) = folder / "model.safetensors", GROUPS["llama"]
    tensors = load_file(path)

    def holds(first: torch.Tensor, second: torch.Tensor) -> bool:
        save_file(tensors | {one: first, other: second.clone()}, path, metadata={"format": "pt"})
        compared(folder)
        return not open_source(folder).weights.untied

    base = tensors[one].bfloat16().float()
    base[0, 0] = 0
    minus, last = base.clone(), base.clone()
    minus[0, 0], last[-1, -1] = -0.0, 3
    assert holds(base, base) and holds(base, minus) and holds(base, base.bfloat16()) and not holds(base, last)


def test_other_stores_are_compared_too() -> None:
    store = MemoryStore(None, {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(4), "d": torch.zeros(3)})
    found = [ties.same(store, "a", name, torch.float32) for name in "abcd"]
    assert found == [True, True, False, False]


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    return with_tensors("llama", tmp_path / "model", {"model.embed_tokens.weight": 1.0, "lm_head.weight": 5.0})


IDS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("to", "spec"),
    [
        ("hf", "magnitude:2:4"),
        ("hf", "gblm:2:4"),
        ("packed:choice=smallest", "magnitude:2:4"),
        pytest.param("onnx", "magnitude:2:4", marks=pytest.mark.slow),
    ],
)
def test_every_output_has_the_files_own_head(apart: Path, tmp_path: Path, to: str, spec: str) -> None:
    sparsify.compile(apart, ["magnitude:2:4"], output=tmp_path / "want", only=["*proj*"])
    made = sparsify.compile(apart, [spec], calibration=[IDS], only=["*proj*"], to=to, output=tmp_path / "out")
    assert made.output is not None
    head = load_file(apart / "model.safetensors")["lm_head.weight"]
    assert torch.equal(made.weight("lm_head.weight"), head)
    assert json.loads((made.output / "config.json").read_text())["tie_word_embeddings"] is False
    if to != "onnx":
        model = load(made.output)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        torch.testing.assert_close(logits(model), logits(made.model))
    if spec == "magnitude:2:4" and to == "hf":
        assert torch.equal(logits(load(tmp_path / "want")), logits(load(made.output)))


def test_the_head_alone_is_pruned_and_the_embedding_is_not(apart: Path, tmp_path: Path) -> None:
    made = sparsify.compile(apart, ["magnitude:2:4"], only=["lm_head*"], output=tmp_path / "out")
    before, after = load_file(apart / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["lm_head.weight"]
    packed = sparsify.compile(
        apart, ["magnitude:2:4"], only=["lm_head*"], output=tmp_path / "packed", to="packed:choice=smallest"
    )
    assert made.output is not None and packed.output is not None
    torch.testing.assert_close(logits(load(packed.output)), logits(load(made.output)))
    from sparsify.backends.packed.unpack import unpack_folder

    back = load_file(unpack_folder(packed.output, tmp_path / "back") / "model.safetensors")
    assert all(torch.equal(back[name], after[name]) for name in after) and back.keys() == after.keys()


@pytest.mark.first(1)
@pytest.mark.parametrize(("kind", "name"), [("bert", "cls.predictions.decoder"), ("t5", "lm_head")])
def test_a_head_that_the_config_goes_on_to_tie_stays_dense(kind: str, name: str, tmp_path: Path) -> None:
    """Where other parameters are tied config.json says so still; of the head transformers asks what it is."""
    with_tensors(kind, tmp_path / "model", {GROUPS[kind][0]: 1.0, f"{name}.weight": 5.0})
    to, batch = "packed:choice=smallest", inputs(kind)
    only = [f"{name}*", "*ttention*"]
    made = sparsify.compile(
        tmp_path / "model", ["magnitude:2:4"], to=to, only=only, calibration=[batch], output=tmp_path / "out"
    )
    assert made.output is not None and any("config.json ties it" in note for note in made.notes)
    assert json.loads((made.output / "config.json").read_text())["tie_word_embeddings"] is True
    torch.testing.assert_close(run(load(made.output), batch), run(made.model, batch), rtol=1e-4, atol=1e-5)


def test_a_smaller_model_keeps_both(apart: Path, tmp_path: Path) -> None:
    made = sparsify.compile(apart, ["llm-pruner:25%"], calibration=[IDS], output=tmp_path / "out")
    assert made.output is not None
    model = load(made.output)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), logits(sparsify.load(made.output)))


def test_one_thing_said_twice_is_written_twice(tmp_path: Path) -> None:
    """Where both are stored and equal they are one parameter, and whoever reads the output finds them equal again."""
    folder = with_tensors("llama", tmp_path / "model", dict.fromkeys(GROUPS["llama"], 1.0))
    made = sparsify.compile(folder, ["magnitude:2:4"], output=tmp_path / "out")
    assert made.output is not None
    before, after = load_file(folder / "model.safetensors"), load_file(made.output / "model.safetensors")
    assert before.keys() == after.keys() and torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert json.loads((made.output / "config.json").read_text())["tie_word_embeddings"] is True
    weights = open_source(folder).weights.on(MemoryStore(open_source(folder).weights.store))
    weights.write("lm_head.weight", torch.zeros(64, 32))
    assert all(not weights.store.read(name).any() for name in GROUPS["llama"])


def test_a_head_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    folder = with_tensors("llama", tmp_path, {"model.embed_tokens.weight": 1.0, "lm_head.weight": None})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings: false, and transformers would fill it with random"):
        open_source(folder)
