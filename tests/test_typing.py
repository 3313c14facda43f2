"""The package is typed for its users: scripts of theirs that use every public name pass mypy --strict."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.layers import PACKAGES
from test_docs import blocks

import sparsify

ROOT = Path(__file__).parent.parent
USER = ROOT / "tests" / "typing" / "user.py"


def test_the_users_script_uses_every_public_name() -> None:
    text = USER.read_text()
    assert not [name for name in sparsify.__all__ if f"sparsify.{name}" not in text]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_users_scripts_pass_mypy_strict(tmp_path: Path) -> None:
    # As it is installed: the folders of passes and backends are packages inside.
    for folder, package in PACKAGES.items():
        shutil.copytree(
            ROOT / folder, tmp_path / "site" / package.replace(".", "/"), dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )  # fmt: skip
    shutil.copy(USER, tmp_path / "user.py")
    for number, code in enumerate(blocks("docs/python.md", "python")):
        (tmp_path / f"documented{number}.py").write_text(code)
    (tmp_path / "wrong.py").write_text("import sparsify\n\nsparsify.evaluate(3, 'text.txt').perplexity.upper()\n")
    found = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary",
            "--cache-dir", ROOT / "build" / "mypy-of-users", *sorted(p.name for p in tmp_path.glob("*.py")),
        ],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": "site"}, capture_output=True, text=True,
    )  # fmt: skip
    assert [line.partition(":")[0] for line in found.stdout.splitlines()] == ["wrong.py", "wrong.py"], found.stdout
