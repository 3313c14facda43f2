"""Every family that the core captures, packed: minutes in all."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES, inputs, run
from support.folders import load, same_files, write_both

from sparsify.backends.packed.unpack import unpack_folder


@pytest.mark.first(6)
@pytest.mark.slow
@pytest.mark.parametrize(("family", "spec"), list(zip(FAMILIES, cycle(["magnitude:2:4", "magnitude:60%"]))))
def test_a_packed_model_gives_the_pruned_models_outputs(family: str, spec: str, tmp_path: Path) -> None:
    hf, folder = write_both(family, tmp_path, spec)
    packed = load(folder)
    torch.testing.assert_close(run(packed, inputs(family)), run(load(hf), inputs(family)), rtol=1e-3, atol=1e-5)
    assert sum(type(m).__name__.startswith("Packed") for m in packed.modules()) > 2
    unpack_folder(folder, tmp_path / "back")
    assert same_files(hf, tmp_path / "back")
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(run(load(tmp_path / "again"), inputs(family)), run(packed, inputs(family)))
