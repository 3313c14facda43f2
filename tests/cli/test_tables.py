"""Tables as they are read: what stands beneath them is no error of the tool's."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from support.families import build

import sparsify
from sparsify.cli.tables import comparison_report, result_report
from sparsify.evaluation.comparison import Compared, ComparedPass


@pytest.fixture(scope="module")
def made() -> sparsify.Compiled:
    ids = torch.randint(3, 60, (16, 12), generator=torch.Generator().manual_seed(0))
    return sparsify.compile(build("llama"), "permute:2:4+wanda:2:4+twin:2:4+refine:epochs=1", calibration=ids)


@pytest.mark.parametrize("width", [60, 72, 80, 100, 160])
def test_no_line_beneath_a_table_looks_like_an_error_of_the_tools_own(width: int, made: sparsify.Compiled) -> None:
    compared = Compared("tiny", "text", None, "layer", [ComparedPass("wanda:2:4", 2.0, 0.1, 0.5, 1.0, 1 << 20)])
    console = Console(file=io.StringIO(), width=width)
    console.print(result_report(made, 1.0))
    console.print(comparison_report(compared))
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert said.count("Errors are") == 3 and "Losses are" in said
    assert not [line for line in said.splitlines() if line.lstrip().startswith(("error:", "warning:"))]
