"""docs/other-compilers.md and what runs it: here where a compiler is installed, all of it with `make compilers`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import check_compilers
import pytest
import torch
from check_compilers import PACKAGES, PAGE, blocks, compared

ROOT = Path(__file__).parents[2]
CASES = [(section, number) for section in PACKAGES for number in range(len(blocks()[section]))]
OURS = {"torch", "sparsify", "transformers", "numpy"}


def imported(code: str) -> list[str]:
    """Packages that a block imports and sparsify does not bring."""
    found = re.findall(r"^(?:import|from) (\w+)", code, flags=re.M)
    return sorted({name for name in found if name not in OURS and name not in sys.stdlib_module_names})


def test_every_section_with_code_is_run_and_none_is_without() -> None:
    assert [name for name in blocks() if name] == list(PACKAGES)
    assert len(blocks()[""]) == 1


@pytest.mark.parametrize("section", PACKAGES)
def test_the_page_names_the_versions_that_it_is_run_with(section: str) -> None:
    text = PAGE.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    for name, number in PACKAGES[section].items():
        assert f"{name} {number}" in text, name


def test_the_page_begins_with_a_pruned_graph_and_a_dense_module() -> None:
    names: dict[str, object] = {}
    exec(blocks()[""][0], names)
    net, pruned = names["net"], names["pruned"]
    assert isinstance(net, torch.nn.Module) and isinstance(pruned, torch.export.ExportedProgram)
    for name, weight in pruned.state_dict.items():
        if weight.dim() == 2:
            assert (weight == 0).sum() * 2 == weight.numel() and (net.get_parameter(name) == 0).sum() < 5


@pytest.mark.parametrize(("section", "number"), CASES)
def test_a_block_compiles_and_leaves_what_is_compared(section: str, number: int) -> None:
    code = blocks()[section][number]
    names = compile(code, section, "exec").co_names
    assert "got" in names and ("want" in names or "ids" not in names)
    assert imported(code) or section == "torch.compile and AOTInductor"


# A C++ compiler is called for each of torch's own: the last, of our operators, is the one that is ours to hold here.
_HERE = [case for case in CASES if case[0] != "torch.compile and AOTInductor"]
_OWN = ("torch.compile and AOTInductor", 2)


@pytest.mark.parametrize(("section", "number"), [pytest.param(*_OWN, marks=pytest.mark.slow), *_HERE])
def test_a_block_gives_what_torch_gives(section: str, number: int, tmp_path: Path) -> None:
    for name in imported(blocks()[section][number]):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed here: make compilers runs this block")
    (tmp_path / "models").symlink_to(ROOT / "models")
    # A process of its own: compilers bring LLVMs that do not bear each other.
    script = [sys.executable, ROOT / "tools" / "check_compilers.py", section, "--run", str(number)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{section}, block {number}: ")


def test_torch_is_the_one_that_the_page_is_run_with() -> None:
    """Else the page's baseline was tried with another."""
    pinned = PACKAGES["torch.compile and AOTInductor"]["torch"]
    if version("torch").partition("+")[0] != pinned:
        pytest.skip(f"torch {version('torch')} is here, and {pinned} in the Makefile")
    assert f"torch=={pinned}" in (ROOT / "Makefile").read_text()


def test_another_output_is_seen() -> None:
    assert compared(torch.tensor([1.0]), torch.tensor([1.0])).startswith("within 0")
    assert compared(torch.tensor([4, 5]), torch.tensor([4, 5])) == "the same 2 tokens"
    for got, want in (([1.0], [1.001]), ([4, 5], [4, 6])):
        with pytest.raises(AssertionError, match=r"not (close|equal)"):
            compared(torch.tensor(got), torch.tensor(want))


def test_without_an_index_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(sys, "argv", ["check_compilers.py", "--environment", str(tmp_path / "none")])
    check_compilers.main()
    assert capsys.readouterr().out.startswith("skipped: no package index answers")
    assert not (tmp_path / "none").exists()


def test_an_unknown_section_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["check_compilers.py", "Glow"])
    with pytest.raises(SystemExit):
        check_compilers.main()
    assert "no section Glow; there are torch.compile and AOTInductor, OpenVINO" in capsys.readouterr().err
