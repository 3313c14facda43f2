"""Recipes: everything of the command line in a file, and a folder as one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_line import sparsify

import sparsify as package
from sparsify.compiler.recipe import backend_text
from sparsify.compiler.recipe_file import KEYS, read_recipe
from sparsify.errors import SpecError
from sparsify.method.spec import parse_backend

SHORT = {"calibration": "random", "samples": 2, "sequence_length": 16}


def written(place: Path, words: dict[str, Any]) -> Path:
    place.write_text(yaml.safe_dump(words))
    return place


def test_passes_with_names_of_their_own(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The same as two commands, each with its --only and --ignore, one after the other."""
    passes = [{"pass": "magnitude:2:4", "only": "*mlp*"}, {"pass": "wanda:50%", "ignore": ["*mlp*", "*.k_proj"]}]
    recipe = written(
        tmp_path / "r.yaml", {"model": str(folder("llama")), "passes": passes, "ignore": "*.q_proj", **SHORT}
    )
    done = sparsify("compile", "--recipe", recipe, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    one, two = json.loads((tmp_path / "out" / "sparsify.json").read_text())["passes"]
    assert {s["name"].rpartition(".")[2] for s in one["sites"]} == {"gate_proj", "up_proj", "down_proj"}
    assert {s["name"].rpartition(".")[2] for s in two["sites"]} == {"v_proj", "o_proj"}
    assert (one["only"], one["ignore"]) == (["*mlp*"], ["*.q_proj"])
    assert (two["only"], two["ignore"]) == ([], ["*.q_proj", "*mlp*", "*.k_proj"])
    words = ("--calibration", "random", "--samples", 2, "--sequence-length", 16)
    first, second = tmp_path / "first", tmp_path / "second"
    assert not sparsify(
        "compile", folder("llama"), "--pass", "magnitude:2:4", "--only", "*mlp*", "-o", first, *words
    ).returncode
    names = "*mlp*,*.k_proj,*.q_proj"
    assert not sparsify("compile", first, "--pass", "wanda:50%", "--ignore", names, "-o", second, *words).returncode
    assert (second / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_structural_pass_with_names_of_its_own(folder: Callable[[str], Path]) -> None:
    passes = [{"pass": "llm-pruner:50%,importance=l1", "only": "*mlp*"}, {"pass": "magnitude:2:4", "ignore": "*mlp*"}]
    made = package.compile(folder("llama"), passes)
    assert {cut.kind for cut in made.structure[0].cuts} == {"channels"}
    assert {site.name.rpartition(".")[2] for site in made.runs[0].sites} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_folder_is_a_recipe(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Run again, its sparsify.json gives the same bytes, the manifest's among them."""
    out, again = tmp_path / "out", tmp_path / "again"
    done = sparsify(
        "compile", folder("llama"), "--pass", "llm-pruner:50%,importance=l1", "--pass", "twin:2:4,blend=0.4", "-o", out,
        "--calibration", "random", "--samples", 3, "--sequence-length", 16, "--seed", 5, "--schedule", "block",
        "--ignore", "*.k_proj", "--compute-dtype", "float32", "--to", "packed:choice=smallest",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for recipe in (out, out / "sparsify.json"):
        done = sparsify("compile", "--recipe", recipe, "-o", again, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}


def test_the_default_source_of_data_is_kept_by_its_name(folder: Callable[[str], Path], tmp_path: Path) -> None:
    made = package.compile(folder("llama"), ["wanda:2:4"], samples=2, sequence_length=16)
    assert made.manifest["recipe"] == {
        "model": str(folder("llama")), "passes": ["wanda:2:4"], "samples": 2, "sequence_length": 16,
        "calibration": "self",
    }  # fmt: skip
    assert "recipe" not in package.compile(made.model, ["magnitude:2:4"]).manifest


def test_save_and_override(folder: Callable[[str], Path], tmp_path: Path) -> None:
    words = ("compile", folder("llama"), "--pass", "magnitude:2:4", "--only", "a", "--only", "b,re:c,d")
    recipe = tmp_path / "r.yaml"
    assert sparsify(*words, "--dry-run", "--save-recipe", recipe).returncode == 2, "a, b and re:c,d match nothing"
    assert read_recipe(recipe) == {
        "model": str(folder("llama")), "passes": ["magnitude:2:4"], "only": ["a", "b", "re:c,d"], "dry_run": True,
    }  # fmt: skip
    planned = sparsify("compile", "--recipe", recipe, "--only", "*mlp*", "--json")
    assert planned.returncode == 0, planned.stderr
    found = json.loads(planned.stdout)
    assert found["dry_run"] and len(found["passes"][0]["targets"]) == 6


def test_no_file_but_an_older_recipe_is_replaced(folder: Callable[[str], Path], tmp_path: Path) -> None:
    words = ("compile", folder("llama"), "--pass", "magnitude:2:4", "--dry-run", "-q", "--save-recipe")
    recipe, notes = tmp_path / "r.yaml", tmp_path / "notes.txt"
    notes.write_text("mine")
    for more in ((), ("--overwrite",)):
        done = sparsify(*words, notes, *more)
        assert done.returncode == 1 and notes.read_text() == "mine" and "did not write" in done.stderr
    assert sparsify(*words, tmp_path).returncode == 1
    assert sparsify(*words, recipe).returncode == 0
    assert sparsify(*words, recipe).returncode == 0, "the same words, to go on with --resume say"
    kept = recipe.read_bytes()
    done = sparsify(*words, recipe, "--samples", 3)
    assert done.returncode == 1 and recipe.read_bytes() == kept and "Pass --overwrite" in done.stderr
    assert sparsify(*words, recipe, "--samples", 3, "--overwrite").returncode == 0
    assert read_recipe(recipe)["samples"] == 3


WRONG = {
    "model: x\n\nsampels: 3\n": "line 3: no such key, 'sampels'. Near names: samples",
    "passes:\n- pass: wanda:2:4\n  onli: a\n": "line 3: no such key, 'onli'. Near names: only",
    "passes:\n- only: a\n": "line 2: no 'pass' beside the names",
    "passes:\n- 3\n": "line 2: 3 is no pass",
    "samples: '3'\n": "line 1: samples is '3'. Give a whole number",
    "samples: true\n": "line 1: samples is True. Give a whole number",
    "only: [1]\n": "line 1: only is [1]. Give a name or a list of names",
    "seed: 1\nseed: 2\n": "line 2: 'seed' a second time",
    "trust_remote_code: true\n": "on the command line alone",
    "a: [\n": "no YAML in line 2",
    "- a\n": "no keys with values",
    "": "no keys with values",
    "model: !!python/object/apply:os.system [id]\n": "no YAML in line 1",
    "passes: [wnda:2:4]\nmodel: x\n": "Near names: wanda",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_recipe_ends_with_two(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    done = sparsify("compile", "m", "--recipe", tmp_path / "r.yaml")
    assert done.returncode == 2 and WRONG[text] in " ".join(done.stderr.split()), done.stderr


def test_what_cannot_be_read(tmp_path: Path) -> None:
    assert sparsify("compile", "m", "--recipe", tmp_path / "none.yaml").returncode == 1
    (tmp_path / "sparsify.json").write_text('{"passes": []}')
    done = sparsify("compile", "m", "--recipe", tmp_path)
    assert done.returncode == 2 and "before recipes were kept" in done.stderr
    with pytest.raises(SpecError, match="'nly', which is no word of it"):
        package.compile("m", [{"pass": "wanda:2:4", "nly": "a"}])


def test_every_option_of_compile_is_a_key() -> None:
    """But for those of one run: what is printed, where a recipe is, and that it goes on with another."""
    import inspect

    from sparsify.cli.compile import compile_command

    alone = {
        "ctx",
        "quiet",
        "log_level",
        "debug",
        "as_json",
        "recipe",
        "save_recipe",
        "trust_remote_code",
        "resume",
        "checkpoint_every",
        "processes",
    }
    assert set(inspect.signature(compile_command).parameters) - alone == set(KEYS)


@pytest.mark.parametrize("text", ["hf", "packed:choice=smallest", "cuda:policy=both,tune=false", "onnx:opset=21"])
def test_a_backend_has_its_text(text: str) -> None:
    assert backend_text(parse_backend(text)) == text


def test_the_help_of_compile_names_every_backend_with_its_options() -> None:
    import dataclasses

    from sparsify.method.registry import find, registered

    said = re.sub(r"\s+", "", sparsify("compile", "--help").stdout)
    for name in registered("sparsify.backends"):
        assert name in said
        for field in dataclasses.fields(find("sparsify.backends", name)):
            assert f"{field.name}=" in said, (name, field.name)
