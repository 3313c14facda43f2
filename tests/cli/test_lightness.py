"""Help and wrong words cost no torch: they answer before anything large is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparsify.method.registry import registered

# Run the command line in a process of its own, and say at its end which of the large packages it has loaded.
CODE = """
import sys
from sparsify.cli.main import main
sys.argv = ["sparsify", *{words!r}]
try:
    main()
except SystemExit as error:
    print("EXIT", error.code)
print("LOADED", *[name for name in ("torch", "transformers", "numpy", "onnx", "safetensors") if name in sys.modules])
"""


def run(*words: str) -> tuple[int, str, list[str]]:
    """Exit code, what was printed, and which large packages were loaded."""
    done = subprocess.run([sys.executable, "-c", CODE.format(words=list(words))], capture_output=True, text=True)
    said, _, loaded = done.stdout.rpartition("LOADED")
    assert "EXIT" in said, done.stderr
    return int(said.rpartition("EXIT")[2] or 0), said + done.stderr, loaded.split()


@pytest.mark.parametrize("command", ["", *sorted(registered("sparsify.commands"))])
def test_help(command: str) -> None:
    code, said, loaded = run(*command.split(), "--help")
    assert code == 0 and "Usage" in said and loaded == []


@pytest.mark.parametrize("words", ["passes", "passes twin", "passes --json", "passes llm-pruner --json"])
def test_what_passes_are_for(words: str) -> None:
    code, said, loaded = run(*words.split())
    assert code == 0 and loaded == [] and ("twin" in said or "llm-pruner" in said)


WRONG = {
    "no such command": ["prune", "model"],
    "no such option": ["compile", "model", "--pas", "wanda:2:4"],
    "no model": ["compile", "--pass", "wanda:2:4"],
    "no pass": ["compile", "model"],
    "no such pass to describe": ["passes", "wnda"],
    "no such pass": ["compile", "model", "--pass", "wnda:2:4"],
    "no such pattern": ["compile", "model", "--pass", "wanda:4:2"],
    "a number that is none": ["compile", "model", "--pass", "wanda:2:4", "--samples", "many"],
    "no such schedule": ["compile", "model", "--pass", "wanda:2:4", "--schedule", "blocks"],
    "no amount of memory": ["compile", "model", "--pass", "wanda:2:4", "--memory", "8 apples"],
    "no such backend": ["compile", "model", "--pass", "wanda:2:4", "--to", "onyx"],
    "no such option of a backend": ["compile", "model", "--pass", "wanda:2:4", "--to", "onnx:opsett=23"],
    "an option of a backend out of range": ["compile", "model", "--pass", "wanda:2:4", "--to", "onnx:opset=3"],
    "no such log level": ["compile", "model", "--pass", "wanda:2:4", "--log-level", "loud"],
    "two specs, one wrong": ["compare", "model", "--passes", "wanda:2:4,sparsgpt:2:4"],
    "no data": ["eval", "model"],
    "no such method of tuning": ["tune", "out", "--data", "text", "-o", "tuned", "--method", "qlora"],
    "amounts that do not divide": ["tune", "out", "--data", "text", "-o", "tuned", "--batch", "6", "--micro", "4"],
    "nothing to unpack": ["unpack"],
    "a graph after no pass": ["compile", "model", "--pass", "wanda:2:4", "--dry-run", "--print-after", "all"],
    "a budget that is none": [
        "search",
        "model",
        "--pass",
        "twin",
        "--budget",
        "perplexity<1",
        "--data",
        "x",
        "-o",
        "y",
    ],
    "a search by no pass": ["search", "m", "--pass", "twn", "--budget", "perplexity<=1.1", "--data", "x", "-o", "y"],
    "no such measure": ["sensitivity", "model", "--pass", "wanda:2:4", "--data", "x", "--measure", "accuracy"],
    "two forms at once": ["inspect", "model", "--graph", "--json"],
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_words(what: str) -> None:
    code, said, loaded = run(*WRONG[what])
    assert code == 2 and loaded == [], said
