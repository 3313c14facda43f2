"""Run the quick tests on other versions of transformers than the one here, each in an environment of its own.

    python tools/compat.py [VERSION…] [--environments .venv-compat] [-- PYTEST ARGUMENTS]

Without versions those at both ends of what pyproject.toml supports: the oldest, and the newest that pip finds. An
environment is made on the first call and used again afterwards. The exit code is the number of versions that failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("versions", nargs="*")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-compat")
    parser.add_argument("--jobs", default="2")
    own = sys.argv[1:]
    cut = own.index("--") if "--" in own else len(own)
    args, more = parser.parse_args(own[:cut]), own[cut + 1 :]
    failed = 0
    for version in args.versions or [oldest(), newest()]:
        python = environment(args.environments / version, version)
        print(f"transformers {version}", flush=True)
        tests = more or ["-m", "not slow"]
        command = [python, "-m", "pytest", "-n", args.jobs, "--dist", "loadscope", "--no-loadscope-reorder", *tests]
        failed += bool(subprocess.run(command, cwd=ROOT).returncode)
    sys.exit(failed)


def oldest() -> str:
    """The lower bound of transformers in pyproject.toml."""
    found = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None, "transformers has a lower bound"
    return found[1]


def newest() -> str:
    """The last release that pip finds."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "transformers"], capture_output=True, text=True, check=True
    )
    found = re.search(r"Available versions: ([\d.]+)", told.stdout)
    assert found is not None, told.stdout
    return found[1]


def environment(folder: Path, version: str) -> Path:
    """The Python of an environment with sparsify's test extra and this transformers."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # torch first: a range would pull gigabytes of CUDA packages. In one step with sparsify, so that pip finds
        # versions of the rest that fit this transformers.
        for packages in (["torch==2.13.0"], [f"transformers=={version}", "--editable", f"{ROOT}[test]"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return python


if __name__ == "__main__":
    main()
