"""What the documents show is run as it stands."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import shlex
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import docs_site
import pytest
import torch
from support.command_line import sparsify as command_line

import sparsify
from sparsify.method import registry
from sparsify.method.description import describe

ROOT = Path(__file__).parent.parent


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), flags=re.S)


def test_the_worked_example_of_contributing_is_a_pass(monkeypatch: Any) -> None:
    (code,) = blocks("CONTRIBUTING.md", "python")
    module = types.ModuleType("worked_example")
    monkeypatch.setitem(sys.modules, "worked_example", module)
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    entry = EntryPoint("rms", "worked_example:Rms", "sparsify.passes")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "sparsify.passes" else [])

    made = sparsify.parse_pass("rms:2:4,power=0.5")
    assert made.power == 0.5  # type: ignore[attr-defined]
    told = describe("rms")
    assert told.form == "rms:PATTERN" and told.broken is None and "power" in {option.name for option in told.options}
    assert [o.default for o in told.shared if o.name == "blocksize"] == [1]
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.randn(16, 8)
    rms = sparsify.compile(net, ["rms:2:4"], calibration=[x]).weight("0.weight")
    assert torch.equal(rms, sparsify.compile(net, ["wanda:2:4"], calibration=[x]).weight("0.weight"))


@pytest.mark.parametrize("module", ["sparsify.compiler.pipeline", "sparsify.passes.wanda", "sparsify.passes.magnitude"])
def test_doctests(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed


PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
# Blocks of other compilers run where these are: tests/tools/test_compilers.py.
ELSEWHERE = {"docs/other-compilers.md"}
# Blocks of a quarter of a minute and more each.
LONG = {("docs/onnx.md", 0), ("docs/onnx.md", 1), ("docs/python.md", 0), ("docs/evaluation.md", 0)}
PYTHON = [
    pytest.param(page, n, marks=pytest.mark.slow if (page, n) in LONG else ())
    for page in PAGES
    if page not in ELSEWHERE
    for n in range(len(blocks(page, "python")))
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number"), PYTHON)
def test_the_python_of_the_pages_runs(
    page: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    torch._dynamo.reset()
    code = blocks(page, "python")[number]
    name = f"{page.replace('/', '_').removesuffix('.md')}_{number}"
    # A dataclass asks for the module that it is in.
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, f"{page}, block {number}", "exec"), module.__dict__)
    assert 'output="pruned"' not in code or (tmp_path / "pruned" / "sparsify.json").exists()
    printed = capsys.readouterr().out.splitlines()
    for shown in re.findall(r"^print\(result\)  # (.*)$", code, flags=re.M):
        assert printed[0] == shown


def test_every_page_is_on_the_site() -> None:
    import yaml

    shown = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    for page in PAGES[1:]:
        assert f"'{page.removeprefix('docs/')}'" in shown, page


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    docs_site.relinked((ROOT / page).read_text(), page)


def test_every_stable_name_has_its_line_and_no_other() -> None:
    text = (ROOT / "docs" / "python.md").read_text().partition("## Stable names")[2]
    assert sorted(re.findall(r"^\| `sparsify\.(\w+)` \|", text, flags=re.M)) == sorted(sparsify.__all__)


def test_the_recipe_of_the_docs_runs(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    (recipe,) = blocks("docs/recipes.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    first = next(line for line in blocks("docs/recipes.md", "sh")[0].splitlines() if line.startswith("sparsify"))
    done = command_line(*shlex.split(first, comments=True)[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "OUT" / "sparsify.json").read_text())
    assert [own["spec"] for own in made["passes"]] == ["magnitude:2:4", "wanda:50%"] and made["recipe"]["samples"] == 4
    assert [len(own["sites"]) for own in made["passes"]] == [18, 20]


@pytest.mark.parametrize("page", [page for page in PAGES if "\nsparsify " in "".join(blocks(page, "sh"))])
def test_the_commands_of_the_pages_parse(page: str) -> None:
    import typer

    from sparsify.cli.main import application

    command: Any = typer.main.get_command(application())
    lines = [
        line
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("sparsify ")
    ]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        sub = command.commands[words[0]]
        sub.make_context(words[0], words[1:], resilient_parsing=False).close()


def test_every_registered_pass_and_backend_is_described() -> None:
    for group, page in (("sparsify.passes", "docs/methods.md"), ("sparsify.backends", "README.md")):
        for name in registry.registered(group):
            assert f"`{name}`" in (ROOT / page).read_text(), name
