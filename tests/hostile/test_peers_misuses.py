"""What other tools do to their users (design/peers.md, section a), asked of sparsify: an error or a right result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from torch import Tensor, nn

import sparsify
from sparsify.errors import SparsifyError, SpecError
from sparsify.frontend.source import open_source
from sparsify.method.weight_pass import Pruned
from sparsify.passes import Wanda
from sparsify.prune.verify import verify_pruned

IDS = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))


def zeros(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


@pytest.mark.parametrize("ignore", ["lm_head", "lm_head.weight", "re:.*lm_head$", "re:.*lm_head", "*lm_head"])
def test_1_2_3_an_ignored_head_stays_dense_however_it_is_spelt(ignore: str) -> None:
    result = sparsify.compile(build("llama"), ["wanda:50%"], calibration=[IDS], only=["*"], ignore=[ignore, "*embed*"])
    assert zeros(result.weight("lm_head.weight")) == 0
    assert zeros(result.weight("model.layers.0.mlp.up_proj.weight")) == 0.5


@pytest.mark.parametrize("family", ["opt", "gpt2", "t5", "mamba"])
def test_4_a_tied_embedding_is_never_touched(family: str, folder: Callable[[str], Path]) -> None:
    result = sparsify.compile(folder(family), ["magnitude:50%"], only=["*"])
    (tied,) = {s.node for s in result.runs[0].skipped if "shared with the embedding" in s.reason}
    assert torch.equal(result.weight(f"{tied}.weight"), open_source(folder(family)).weights.read(f"{tied}.weight"))


def test_5_an_allocation_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(SpecError, match="option allocation=besa"):
        sparsify.compile("/no/model", ["wanda:50%,allocation=besa"])


def test_6_magnitude_prunes() -> None:
    result = sparsify.compile(build("llama"), ["magnitude:50%"])
    for site in result.runs[0].sites:
        assert zeros(result.weight(site.parameter)) == pytest.approx(0.5, abs=0.01)


def test_7_gpt2_conv1d_is_pruned_along_its_inputs() -> None:
    result = sparsify.compile(build("gpt2"), ["wanda:2:4"], calibration=[IDS])
    assert len(result.runs[0].sites) == 8
    weight = result.weight("transformer.h.0.mlp.c_fc.weight")
    assert weight.shape == (32, 128) and bool(((weight.t().reshape(-1, 4) != 0).sum(1) == 2).all())


def test_8_a_target_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(SpecError, match="Near names"):
        sparsify.compile(build("llama"), ["wanda:50%"], calibration=[IDS], only=["Linera"])


@pytest.mark.parametrize("pattern", ["50", "1.5", "150%", "5000%"])
def test_9_a_percentage_by_mistake_zeroes_nothing(pattern: str) -> None:
    with pytest.raises(SpecError):
        sparsify.compile("/no/model", [f"wanda:{pattern}"])


@pytest.mark.parametrize("spec", ["wanda:2:4,sparsity=0.3", "wanda:30%:2:4", "wanda:2:4,30%", "wanda:2:4,count=exact"])
def test_10_a_ratio_that_contradicts_the_pattern_is_an_error(spec: str) -> None:
    with pytest.raises(SpecError):
        sparsify.compile("/no/model", [spec])


def test_11_groups_that_do_not_fit_are_told_before_calibration() -> None:
    def never() -> Any:
        yield pytest.fail("calibration was read")

    with pytest.raises(SpecError, match="Did you mean 4:5"):
        sparsify.compile(build("llama"), ["wanda:5:4"], calibration=never())
    with pytest.raises(SpecError, match="in_features 32 is not a multiple of 7"):
        sparsify.compile(build("llama"), ["wanda:3:7"], calibration=[IDS])


def test_12_a_misspelt_pattern() -> None:
    with pytest.raises(SpecError, match="N:M"):
        sparsify.compile("/no/model", ["wanda:2of4"])


def test_13_no_data_is_the_models_own_or_a_clear_error() -> None:
    small = sparsify.compile(build("llama"), ["wanda:50%"], samples=2, sequence_length=8)
    assert small.calibration is not None and small.calibration.label.startswith("self")
    with pytest.raises(SparsifyError, match="Give batches"):
        sparsify.compile(nn.Sequential(nn.Linear(8, 8)), ["wanda:50%"])


def test_14_one_nan_stops_the_run_and_names_the_weight() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[5, 5] = float("nan")
    with pytest.raises(SparsifyError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight of LlamaForCausalLM: NaN"):
        sparsify.compile(model, ["wanda:50%"], calibration=[IDS])


def test_15_a_misspelt_option_is_named() -> None:
    with pytest.raises(SpecError, match="Near names: blocksize"):
        sparsify.compile("/no/model", ["wanda:50%,blokcsize=128"])


def test_16_a_pass_whose_weights_are_not_what_it_promises_is_stopped() -> None:
    """modelopt computes an update on a clone and keeps the mask alone; here either is checked after each site."""
    before = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask.view(-1, 4)[:, :2] = True
    good = before.masked_fill(mask, 0)
    method = sparsify.parse_pass("magnitude:2:4")
    verify_pruned("x", method, before, Pruned(good, mask))
    for weight, what in (
        (good * 2, "a kept weight that changed"),
        (before, "a pruned weight that is not zero"),
        (good + float("nan"), "NaN"),
        (good[:2], "shape"),
    ):
        with pytest.raises(SparsifyError, match=what):
            verify_pruned("x", method, before, Pruned(weight, mask))
    with pytest.raises(SparsifyError, match="keep more than 1 of 4"):
        verify_pruned("x", sparsify.parse_pass("magnitude:1:4"), before, Pruned(good, mask))


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "3:4", "1:2", "8:32", "33%"])
def test_17_any_pattern_not_only_2_4(pattern: str) -> None:
    result = sparsify.compile(build("llama"), [f"wanda:{pattern}"], calibration=[IDS])
    share = float(Wanda(sparsify.parse_pass(f"wanda:{pattern}").pattern).pattern.sparsity)
    assert zeros(result.weight("model.layers.0.mlp.up_proj.weight")) == pytest.approx(share, abs=0.04)


def test_18_grouped_query_attention_prunes_all_four_projections() -> None:
    result = sparsify.compile(build("llama"), ["wanda:2:4"], calibration=[IDS])
    names = {s.name.rpartition(".")[2] for s in result.runs[0].sites}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= names


def test_a_loader_of_token_ids_needs_no_tokenizer_or_processor() -> None:
    loader = torch.utils.data.DataLoader(IDS, batch_size=1)
    assert sparsify.compile(build("llama"), ["wanda:2:4"], calibration=loader).runs[0].kept == 0.5


def test_more_samples_than_128_all_count() -> None:
    ids = torch.randint(3, 60, (130, 8))
    result = sparsify.compile(build("llama"), ["wanda:2:4"], calibration=[ids])
    assert result.runs[0].sites[0].tokens == 130 * 8


def test_a_long_context_allocates_nothing_for_it(ids: Tensor) -> None:
    model = build("llama")
    model.config.max_position_embeddings = 131072
    assert sparsify.compile(model, ["wanda:2:4"], calibration=[ids]).runs[0].kept == 0.5
