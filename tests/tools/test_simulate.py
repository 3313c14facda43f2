"""tools/simulate_scale.py: what is foreseen of a tiny model, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulate_scale import Model, total
from support.families import save

ROWS, LENGTH, BATCHES = 2, 16, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("simulated") / "model"
    save("llama", place)
    # A config is all that it takes.
    (place / "model.safetensors").unlink()
    return place


def test_costs_are_those_counted_by_hand(folder: Path) -> None:
    model = Model(folder, "sparsegpt:2:4", LENGTH, ROWS)
    groups = [group.sites for group in model.measuring.groups]
    assert len(groups) == 8 and sum(map(len, groups)) == 14
    tokens, sites = ROWS * LENGTH * BATCHES, [site for group in groups for site in group]
    inputs = [group[0].shape[1] for group in groups]
    alone, both = (total(model.regions(count, BATCHES)) for count in (1, 2))
    # Attention's own products and the last down_proj, which nothing runs, are the rest.
    linear = sum(2 * tokens * s.shape[0] * s.shape[1] for s in sites if not s.name.endswith("1.mlp.down_proj"))
    assert linear < alone.forward < 1.5 * linear
    # Beside the matrix of each input a vector, of which what every batch adds is sent.
    assert set(model.own.statistics) == {"gram", "squared_norm"}
    assert alone.measured == sum(2 * tokens * (size**2 * 5 / 8 + size) for size in inputs)
    weights = sum(site.shape[0] * site.shape[1] for site in sites)
    # Of each matrix what is computed, by a ring; of each weight the mask, and the half that is kept.
    assert set(inputs) == {32, 64}
    grams = sum(4 * size**2 for size in inputs)
    assert alone.sent == 0
    assert both.sent == 2 * grams + 2 * sum(4 * 3 * size for size in inputs) + (1 / 8 + 4 / 2) * weights
    assert both.forward == alone.forward / 2 and both.measured == alone.measured / 2
    # One live value of a step is the residual stream, of float32.
    assert alone.activations >= BATCHES * ROWS * LENGTH * inputs[0] * 4
    assert alone.statistics == 4 * max(inputs) ** 2 + 8 * max(inputs)


def test_vectors_are_sent_batch_by_batch(folder: Path) -> None:
    model = Model(folder, "wanda:2:4", LENGTH, ROWS)
    weights = sum(s.shape[0] * s.shape[1] for group in model.measuring.groups for s in group.sites)
    inputs = sum(group.sites[0].shape[1] for group in model.measuring.groups)
    both = total(model.regions(3, BATCHES))
    assert both.sent == 3 * 2 * 2 * inputs * 4 + 2 * weights / 8


def test_a_pass_of_unknown_costs_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="costs are known of wanda and sparsegpt"):
        Model(folder, "twin:2:4", LENGTH, ROWS)
