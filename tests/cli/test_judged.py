"""``compile --eval`` and ``eval`` of several models: figures, verdicts, JSON, recipes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import sparsify

WORDS = ("--calibration", "random", "--samples", 2, "--sequence-length", 16)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    ids = torch.randint(3, 60, (9, 16), generator=torch.Generator().manual_seed(3))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    return tmp_path / "ids.safetensors"


def plainly(said: str) -> str:
    return " ".join(said.split())


def test_the_figures_are_those_of_eval(folder: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out", ("--eval", text, "--eval-windows", 8, "--json")
    done = sparsify("compile", folder("llama"), "--pass", "wanda:2:4", "-o", out, *WORDS, *words)
    assert done.returncode == 0, done.stderr
    judged = json.loads(done.stdout)["evaluation"]
    assert judged == json.loads((out / "sparsify.json").read_text())["evaluation"]
    shown = sparsify(
        "eval", folder("llama"), out, "--data", text, "--windows", 8, "--sequence-length", 16, "--json"
    )  # fmt: skip
    dense, pruned = json.loads(shown.stdout)
    assert judged["dense"] == dense["perplexity"] and "against_the_first" not in dense
    assert judged["pruned"] == pytest.approx(pruned["perplexity"], rel=1e-6)
    against = pruned["against_the_first"]
    assert judged["ratio"] == pytest.approx(against["ratio"], rel=1e-6)
    assert judged["standard_error"] == pytest.approx(against["standard_error"], rel=1e-3)
    assert judged["windows"] == 8 and judged["sha256"] == pruned["sha256"]
    assert "losses" not in dense
    table = plainly(
        sparsify("eval", folder("llama"), out, "--data", text, "--windows", 8, "--sequence-length", 16).stdout
    )
    assert f"{against['ratio']:.3f}×" in table and f"{against['standard_error']:.2%}" in table
    assert f"times the perplexity of {folder('llama')}: " in table


def test_the_table_ends_with_the_verdict(folder: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    words = ("compile", folder("llama"), "--pass", "magnitude:2:4", "--eval", text, "--sequence-length", 16)
    done = sparsify(*words, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    judged = json.loads((tmp_path / "out" / "sparsify.json").read_text())["evaluation"]
    said = plainly(done.stdout)
    assert judged["verdict"] in said and "perplexity on 9 windows of 16 tokens" in said
    assert f"{judged['dense']:.3f}" in said and f"{judged['pruned']:.3f}" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{judged['dense']:.3f} → {judged['pruned']:.3f}" in card and "not measured" not in card
    planned = sparsify(*words, "--dry-run")
    assert "perplexity would be measured before and after, on 9 windows" in plainly(planned.stdout)
    assert json.loads(sparsify(*words, "--dry-run", "--json").stdout)["notes"]
    without = sparsify("compile", folder("llama"), "--pass", "magnitude:2:4", "-o", tmp_path / "no", "--json")
    assert json.loads(without.stdout)["evaluation"] is None
    assert "evaluation" not in json.loads((tmp_path / "no" / "sparsify.json").read_text())


def test_a_recipe_and_a_folder_make_the_same_again(folder: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", tmp_path / "r.yaml"
    words = (*WORDS, "--eval", text, "--eval-windows", 4)
    done = sparsify("compile", folder("llama"), "--pass", "wanda:2:4", "-o", out, *words, "--save-recipe", recipe)
    assert done.returncode == 0, done.stderr
    assert f"eval: {text}" in recipe.read_text() and "eval_windows: 4" in recipe.read_text()
    manifest = (out / "sparsify.json").read_bytes()
    for again in (recipe, out):
        done = sparsify("compile", "--recipe", again, "-o", tmp_path / "again", "--overwrite")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "again" / "sparsify.json").read_bytes() == manifest
    recipe.write_text(recipe.read_text().replace("eval_windows: 4", "eval_windows: many"))
    done = sparsify("compile", "--recipe", recipe, "-o", tmp_path / "again")
    assert done.returncode == 2 and "Give a whole number" in done.stderr


def test_models_of_other_tokens_are_shown_and_not_compared(
    bundled: Path, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Another tokenizer over the same text: both perplexities, and a word on why no pairs."""
    import shutil

    from transformers import AutoTokenizer

    other = tmp_path / "other"
    shutil.copytree(bundled, other)
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:50]
    file.write_text(json.dumps(content))
    text = tmp_path / "a.txt"
    text.write_text("def function(argument):\n    raise NotImplementedError(argument)\n" * 40)
    assert tokenizer(text.read_text()) != AutoTokenizer.from_pretrained(other)(text.read_text())
    words = ("eval", bundled, other, "--data", text, "--sequence-length", 32, "--windows", 3)
    assert f"{other}: its windows hold other tokens" in plainly(sparsify(*words).stdout).replace(" ,", ",")
    assert json.loads(sparsify(*words, "--json").stdout)[1]["against_the_first"]["ratio"] is None


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("--pass", "wanda:2:4", "--eval", "nowhere.txt"), 1, "data 'nowhere.txt': no such file"),
        (("--pass", "wanda:2:4", "--eval", ""), 1, "data '': no such file"),
        (("--pass", "wanda:2:4", "--eval", "{empty}"), 1, "a folder without files of text"),
        (("--to", "onnx", "--eval", "{text}"), 2, "no pass, so that there is nothing to compare"),
        (("--pass", "wanda:2:4", "--eval-windows", "3"), 2, "Name one with --eval TEXT"),
        (("--pass", "wanda:2:4", "--eval", "{text}", "--eval-windows", "0"), 2, "'--eval-windows'"),
        (("--pass", "wanda:2:4", "--eval", "{text}", "--chat-template", "{template}"), 2, "no chat messages in"),
    ],
)
def test_wrong_words(
    words: tuple[str, ...], code: int, why: str, folder: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}")
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "text": text, "template": tmp_path / "t.jinja"}
    done = sparsify("compile", folder("llama"), "-o", tmp_path / "out", *(w.format(**places) for w in words), *WORDS)
    assert done.returncode == code and why in plainly(done.stderr), done.stderr
    assert not (tmp_path / "out").exists() and not re.search("Traceback", done.stderr)
