"""Sequences fit the table of positions: the default does, and what does not is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

import sparsify
from sparsify.data.batches import evaluation_windows, expected_batch, load_calibration
from sparsify.data.inputs import default_length
from sparsify.errors import SpecError
from sparsify.evaluation.compare import compare
from sparsify.evaluation.evaluate import evaluate
from sparsify.frontend.source import Source, open_source
from sparsify.frontend.tables import position_table
from sparsify.quality.perplexity import perplexity

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64, "pad_token_id": 1, "eos_token_id": 2,
    "bos_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip
# Family, with the longest sequence that its table has rows for; None where there is no table.
FAMILIES: dict[str, tuple[Callable[[], Any], int | None]] = {
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, max_position_embeddings=24)), 24),
    "roberta": (lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SMALL, max_position_embeddings=26)), 24),
    "padding of another number": (
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SMALL, max_position_embeddings=26, pad_token_id=4)), 21),
    "xlm-roberta": (lambda: hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**SMALL, max_position_embeddings=26)), 24),
    "mpnet": (lambda: hf.MPNetForMaskedLM(hf.MPNetConfig(**SMALL, max_position_embeddings=26)), 24),
    "electra": (lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**SMALL, max_position_embeddings=24)), 24),
    "albert": (lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**SMALL, max_position_embeddings=24)), 24),
    "distilbert": (
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(dim=32, n_layers=1, n_heads=4, hidden_dim=64, vocab_size=64,
                                max_position_embeddings=24)), 24),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=24,
                                                      bos_token_id=1, eos_token_id=2)), 24),
    "gpt-neo": (
        lambda: hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(hidden_size=32, num_layers=1, num_heads=4, vocab_size=64, max_position_embeddings=24,
                            attention_types=[[["global"], 1]], bos_token_id=1, eos_token_id=2)), 24),
    "gpt-j": (lambda: hf.GPTJForCausalLM(hf.GPTJConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=24,
                                                       rotary_dim=4, bos_token_id=1, eos_token_id=2)), 24),
    "opt": (lambda: hf.OPTForCausalLM(
        hf.OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
                     max_position_embeddings=24, word_embed_proj_dim=32)), 24),
    "biogpt": (lambda: hf.BioGptForCausalLM(hf.BioGptConfig(**SMALL, max_position_embeddings=24)), 24),
    "bart": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART, max_position_embeddings=24)), 24),
    "mbart": (lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**BART, max_position_embeddings=24)), 24),
    "pegasus": (lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**BART, max_position_embeddings=24)), 24),
    "marian": (
        lambda: hf.MarianMTModel(
            hf.MarianConfig(**BART, max_position_embeddings=24, decoder_start_token_id=1)), 24),
    "a shorter decoder": (
        lambda: hf.LEDForConditionalGeneration(
            hf.LEDConfig(**BART, max_encoder_position_embeddings=64, max_decoder_position_embeddings=24,
                         attention_window=8)), 24),
    "clip's text, not its pictures": (
        lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config={**SMALL, "max_position_embeddings": 24, "projection_dim": 8},
                          vision_config={**SMALL, "image_size": 16, "patch_size": 8})), 24),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, max_position_embeddings=24)), None),
    "bloom": (lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64)), None),
    "t5": (lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64)), None),
    "made as needed": (lambda: hf.XGLMForCausalLM(
        hf.XGLMConfig(d_model=32, ffn_dim=64, num_layers=1, attention_heads=4, vocab_size=64,
                      max_position_embeddings=24)), None),
}  # fmt: skip


def run(model: Any, length: int) -> None:
    ids = torch.randint(5, 60, (2, length))
    more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    if isinstance(model, hf.CLIPModel):
        model = model.text_model
    with torch.no_grad():
        model(input_ids=ids, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_as_long_as_transformers_finds_it(family: str) -> None:
    make, most = FAMILIES[family]
    model = make().eval()
    table = position_table(open_source(model))
    assert (table.tokens if table is not None else None) == most
    if most is None:
        run(model, 40)
        return
    run(model, most)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        run(model, most + 1)


def test_of_the_families_of_the_suite(folder: Callable[[str], Path]) -> None:
    """Skeletons of folders have the same tables as modules."""
    for family, most in (("opt", 64), ("gpt2", 64), ("bert", 64), ("llama", None), ("mamba", None), ("vit", None)):
        table = position_table(open_source(folder(family)))
        assert (None if table is None else table.tokens) == most, family


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"ids": torch.randint(5, 60, (4000,), generator=torch.Generator().manual_seed(0))}, path)
    return str(path)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("roberta") / "model"
    FAMILIES["roberta"][0]().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2") / "model"
    FAMILIES["gpt2"][0]().save_pretrained(path)
    return path


def test_the_default_length_fits(roberta: Path, ids: str, tmp_path: Path) -> None:
    assert default_length(open_source(roberta)) == 24
    result = sparsify.compile(roberta, ["wanda:2:4"], calibration=ids, samples=4, output=tmp_path / "out")
    assert result.calibration is not None and result.calibration.sequence_length == 24


SAYS = r"sequence length 25: the position table .*wpe has 24 rows \(model\)\. Give at most 24"


def test_what_does_not_fit_is_refused_everywhere(
    gpt2: Path, roberta: Path, ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsify.tuning.tune import Recipe, tune

    monkeypatch.setattr(nn.Module, "__call__", lambda *_, **__: pytest.fail("the model ran"))
    out = tmp_path / "out"
    for tried in (
        lambda: sparsify.compile(gpt2, ["wanda:2:4"], calibration=ids, sequence_length=25, output=out),
        lambda: sparsify.compile(gpt2, ["wanda:2:4"], calibration=ids, sequence_length=25, dry_run=True),
        lambda: sparsify.compile(gpt2, ["magnitude:2:4"], sequence_length=25, output=out),
        lambda: evaluate(gpt2, ids, sequence_length=25),
        lambda: compare(gpt2, ["wanda:2:4"], calibration=ids, sequence_length=25),
        lambda: compare(gpt2, ["wanda:2:4"], calibration=ids, data=ids, sequence_length=25),
        lambda: tune(gpt2, ids, out, Recipe(length=25)),
        lambda: load_calibration("self", open_source(gpt2), sequence_length=25),
        lambda: load_calibration([torch.zeros(2, 25, dtype=torch.long)], open_source(gpt2)),
        lambda: expected_batch(None, open_source(gpt2), sequence_length=25),
        lambda: evaluation_windows(ids, open_source(gpt2), 25, None),
        lambda: perplexity(open_source(gpt2), torch.zeros(2, 25, dtype=torch.long)),
    ):
        with pytest.raises(SpecError, match=SAYS):
            tried()
    assert not out.exists()
    with pytest.raises(SpecError, match="has 26 rows, the first 2 of them for no position"):
        load_calibration(ids, open_source(roberta), sequence_length=25)


def test_positions_of_ones_own_may_be_anything(gpt2: Path) -> None:
    batch: dict[str, Tensor] = {
        "input_ids": torch.zeros(1, 30, dtype=torch.long),
        "position_ids": torch.arange(30)[None] % 24,
    }
    assert load_calibration([batch], open_source(gpt2)).sequence_length == 30


def test_other_modules_have_no_table() -> None:
    net = nn.Sequential(nn.Embedding(8, 4))
    net.add_module("position_embeddings", nn.Embedding(8, 4))
    assert position_table(open_source(net)) is None
    assert position_table(Source("x", net, None)) is None  # type: ignore[arg-type]
