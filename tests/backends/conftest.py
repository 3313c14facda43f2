"""Folders that several tests read: exporting a model takes seconds, so each is written once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.onnx_models import endless

import sparsify

Written = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """``written("llama", "onnx")``: that family's smallest model pruned to 2:4 by magnitude, as the backend writes it.

    Do not write to it. ``"dense"`` stands for the model as it was.
    """
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, to: str) -> Path:
        if (family, to) not in made:
            out = tmp_path_factory.mktemp("written") / "out"
            if to == "dense":
                endless(family).save_pretrained(out)
            else:
                sparsify.compile(get(family, "dense"), ["magnitude:2:4"], to=to, output=out)
            made[family, to] = out
        return made[family, to]

    return get
