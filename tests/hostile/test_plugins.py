"""Packages of other people that are broken, or take names that are ours: named in a warning, at no other cost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.errors import SpecError
from sparsify.frontend.source import open_source
from sparsify.method.description import describe_passes
from sparsify.method.registry import find, registered
from sparsify.method.spec import parse_pass
from sparsify.passes import Wanda

BROKEN = {
    "exits": "raise SystemExit(3)",
    "leaves": "import sys; sys.exit()",
    "is_no_python": "def (",
    "recurses": "def f(): f()\nf()",
    "divides": "1 / 0",
    "needs": "import no_such_module_of_theirs",
    "panics": "class Panic(BaseException): pass\nraise Panic('\\x1b[31m')",
    "lacks": "",
    "is_no_text": "\0",
}


def install(site: Path, package: str, code: str, facts: str | bytes, name: str | None = None) -> None:
    """A package, as pip would put it there."""
    (site / package).mkdir(parents=True, exist_ok=True)
    (site / package / "__init__.py").write_text(code)
    place = site / f"{package}-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name or package}\nVersion: 1.0\n")
    (place / "entry_points.txt").write_bytes(facts if isinstance(facts, bytes) else facts.encode())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    return place


def everywhere(package: str, what: str = "Thing") -> str:
    groups = ("passes", "backends", "commands", "stores", "quantizers")
    return "".join(f"[sparsify.{group}]\n{package.replace('_', '-')} = {package}:{what}\n" for group in groups)


def command(site: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparsify", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("package", BROKEN)
def test_one_that_does_not_load(package: str, site: Path, bundled: Path) -> None:
    install(site, package, BROKEN[package], everywhere(package))
    name = package.replace("_", "-")
    for spec in (name, f"{name}:2:4"):
        with pytest.raises(SpecError, match=f"{package}:Thing does not load.*the package '{package}' brings it"):
            parse_pass(spec)
    with pytest.raises(SpecError, match=f"backend '{name}'.*does not load"):
        find("sparsify.backends", name)
    assert isinstance(parse_pass("wanda:2:4"), Wanda)
    rows = {row.name: row.broken for row in describe_passes()}
    assert package in (rows[name] or "") and rows["wanda"] is None
    # A store is asked of every model; one that is broken is none of its concern.
    with pytest.warns(RuntimeWarning, match=f"store '{name}' is left out.*'{package}'"):
        assert open_source(bundled).folder == bundled


@pytest.mark.slow
def test_the_commands_with_all_of_them(site: Path, bundled: Path, tmp_path: Path) -> None:
    for package, code in BROKEN.items():
        install(site, package, code, everywhere(package))
    install(site, "odd", "VALUE = 3\ndef wrong(x: 'NoSuchName'): 'bold[/b]'\ndef fine(): '[/b] \\x1b[31m'\n", (
        "[sparsify.commands]\nodd = odd:VALUE\nwrong = odd:wrong\nfine = odd:fine\n[sparsify.passes]\nodd = odd:VALUE\n"
    ))  # fmt: skip
    version = command(site, "--version")
    assert version.returncode == 0 and version.stdout.strip() and "Traceback" not in version.stderr, version.stderr
    assert "\x1b" not in version.stderr and version.stderr.startswith("warning: command")
    for package in BROKEN:
        assert f"the package '{package}' brings it" in version.stderr
    assert "command 'wrong' is left out" in version.stderr and "command 'odd' is left out" in version.stderr
    said = command(site, "--help")
    assert said.returncode == 0 and "compile" in said.stdout and " fine " in said.stdout and "\x1b" not in said.stdout
    listed = command(site, "passes")
    assert listed.returncode == 0 and "wanda:PATTERN" in listed.stdout
    assert listed.stdout.count("cannot be used") == len(BROKEN) + 1 and "\x1b" not in listed.stdout + listed.stderr
    done = command(site, "compile", bundled, "--pass", "magnitude:2:4", "-o", tmp_path / "out")
    assert done.returncode == 0 and (tmp_path / "out" / "sparsify.json").exists(), done.stderr
    asked = command(site, "compile", bundled, "--pass", "exits:2:4", "-o", tmp_path / "x")
    assert asked.returncode == 2 and "pass 'exits': its entry point exits:Thing does not load" in asked.stderr
    assert "the package 'exits' brings it" in asked.stderr and not (tmp_path / "x").exists()


@pytest.mark.parametrize("facts", [b"\xff\xfe\0", b"[sparsify.passes]\nno equals sign\n", b"x = y\n", b"[[]\n= =\n"])
def test_facts_that_cannot_be_read(facts: bytes, site: Path, recwarn: pytest.WarningsRecorder) -> None:
    install(site, "garbled", "", facts)
    install(site, "fine", "", "[sparsify.passes]\nfine = fine:Thing\n")
    assert "fine" in registered("sparsify.passes") and parse_pass("wanda:2:4").name == "wanda"
    said = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
    assert not said or all("garbled" in text for text in said)
    assert said or facts.startswith((b"x", b"[["))


def test_a_package_without_facts(site: Path) -> None:
    install(site, "fine", "", "[sparsify.passes]\nfine = fine:Thing\n")
    (site / "empty-1.0.dist-info").mkdir()
    (site / "odd-1.0.dist-info").mkdir()
    (site / "odd-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xff\n\n\xfe")
    (site / "odd-1.0.dist-info" / "entry_points.txt").mkdir()
    assert "fine" in registered("sparsify.passes")


def test_names_that_are_taken(site: Path) -> None:
    """Ours stay ours; of two packages the first by name has it; both are said."""
    install(site, "greedy", "raise SystemExit('run')", "[sparsify.passes]\nwanda = greedy:Thing\n")
    with pytest.warns(RuntimeWarning, match="the package 'greedy' brings a pass 'wanda' too.*sparsify's own is used"):
        assert isinstance(parse_pass("wanda:2:4"), Wanda)
    assert "greedy" not in sys.modules
    install(site, "b_second", "", "[sparsify.passes]\ncommon = b_second:Thing\n")
    install(site, "a_first", "", "[sparsify.passes]\ncommon = a_first:Thing\n")
    with pytest.warns(RuntimeWarning, match="'b_second' brings a pass 'common' too.*that of the package 'a_first'"):
        assert registered("sparsify.passes")["common"].value == "a_first:Thing"


@pytest.mark.slow
def test_a_quantizer_that_is_broken_leaves_transformers_alone(site: Path) -> None:
    install(site, "panics", BROKEN["panics"], "[sparsify.quantizers]\ntheirs = panics:Thing\n")
    code = "import sparsify, transformers.quantizers.auto as a; print('sparsify' in a.AUTO_QUANTIZER_MAPPING)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(site)}
    )
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr
    assert "quantizer 'theirs' is left out" in done.stderr
