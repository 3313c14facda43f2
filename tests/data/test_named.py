"""Names of text that is not there are refused before any model is opened, whatever they are given for."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import sparsify as command_line

COMMANDS = {
    "compile": "compile MODEL --pass wanda:2:4 --calibration GONE -o OUT",
    "compile, judged": "compile MODEL --pass magnitude:2:4 --eval GONE -o OUT",
    "eval": "eval MODEL --data GONE",
    "compare": "compare MODEL --passes wanda:2:4 --data GONE",
    "compare, calibrated": "compare MODEL --passes wanda:2:4 --calibration GONE --data python-stdlib",
    "sensitivity": "sensitivity MODEL --pass wanda:2:4 --data GONE",
    "search": "search MODEL --pass wanda --budget perplexity<=1.05 --data GONE -o OUT",
    "search, calibrated": "search MODEL --pass wanda --budget perplexity<=2 --data c4 --calibration GONE -o OUT",
    "tune": "tune MODEL -o OUT --data GONE",
    "tune, judged": "tune MODEL -o OUT --data python-stdlib --validation GONE",
}  # fmt: skip


@pytest.mark.parametrize("what", COMMANDS)
@pytest.mark.parametrize("gone", ["gone.txt", "./gone", "gone.jsonl:text"])
def test_what_is_not_there_is_missed_first(what: str, gone: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    words = [{"MODEL": str(model), "GONE": gone, "OUT": "out"}.get(word, word) for word in COMMANDS[what].split()]
    done = command_line(*words, cwd=tmp_path)
    # The folder holds no model, which is told later.
    assert done.returncode == 1 and f"data '{gone}': no such file" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
