"""Run the snippets of docs/other-compilers.md in other compilers and compare their outputs with torch's.

    python tools/check_compilers.py [SECTION…] [--environment .venv-compilers]

The compilers' packages are installed into an environment of their own, made on the first call: 1.3 GB beside torch.
Where no package index answers it says so and checks nothing. Every block runs in a process of its own, after the
page's first one, and leaves ``got``, held against ``want``. The exit code is the number of blocks that failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "other-compilers.md"
# What each section of the page is run with; the page names the same versions.
PACKAGES = {
    "torch.compile and AOTInductor": {"torch": "2.13.0"},
    "OpenVINO": {"openvino": "2026.4.1"},
    "ExecuTorch": {"executorch": "1.5.1"},
    "IREE": {"iree-base-compiler": "3.13.0", "iree-base-runtime": "3.13.0"},
    "TVM": {"apache-tvm": "0.27.0.post1"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(PACKAGES)}; all of them where none is named")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-compilers")
    # In the other environment: run this block and nothing else.
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.sections) - set(PACKAGES):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(PACKAGES)}")
    if args.run is not None:
        print(f"{args.sections[0]}, block {args.run}: {run(args.sections[0], args.run)}")
        return
    python = environment(args.environment)
    if python is None:
        print("skipped: no package index answers, and without it there is no environment to check in")
        return
    failed = 0
    for section in args.sections or PACKAGES:
        for number in range(len(blocks()[section])):
            with tempfile.TemporaryDirectory() as scratch:
                (Path(scratch) / "models").symlink_to(ROOT / "models")
                words = [python, "-W", "ignore", Path(__file__).resolve(), section, "--run", str(number)]
                done = subprocess.run(words, cwd=scratch, capture_output=True, text=True)
            # Compilers say much on both streams; what they say matters where they fail.
            said = done.stdout.splitlines()[-1] if done.returncode == 0 else done.stdout + done.stderr
            print(said if done.returncode == 0 else f"{section}, block {number}: FAILED\n{said}", flush=True)
            failed += done.returncode != 0
    sys.exit(failed)


def environment(folder: Path) -> Path | None:
    """The Python of an environment with sparsify and the compilers; None where it is not made and cannot be."""
    python = folder.absolute() / "bin" / "python"
    pins = {name: version for packages in PACKAGES.values() for name, version in packages.items()}
    if not (folder / "ready").exists():
        asked = [sys.executable, "-m", "pip", "index", "versions", "openvino"]
        if subprocess.run(asked, capture_output=True).returncode:
            return None
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # torch first: a range would pull gigabytes of CUDA packages.
        torch = f"torch=={pins.pop('torch')}"
        compilers = [f"{name}=={version}" for name, version in pins.items()]
        for packages in ([torch], [torch, "--editable", str(ROOT), *compilers]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return python


def blocks() -> dict[str, list[str]]:
    """The page's blocks of Python by section; those before the first section, under an empty name."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.M)
    texts = zip(["", *parts[1::2]], parts[::2], strict=True)
    found = {name: re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M) for name, text in texts}
    return {name: code for name, code in found.items() if code}


def run(section: str, number: int) -> str:
    """Run a block after the page's first one, here.

    Raises:
        AssertionError: it gives something else than torch.
    """
    import torch

    (first,), code = blocks()[""], blocks()[section][number]
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(first, str(PAGE), "exec"), names)
    exec(compile(code, f"{PAGE}, {section}, block {number}", "exec"), names)
    return compared(torch.as_tensor(names["got"]), torch.as_tensor(names["want"]))


def compared(got: Any, want: Any) -> str:
    """How far ``got`` is from ``want``; integers, which are tokens, must be the same."""
    import torch

    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if not want.is_floating_point():
        return f"the same {want.numel()} tokens"
    return f"within {(got - want).abs().max():.1g} of torch, whose outputs reach {want.abs().max():.2g}"


if __name__ == "__main__":
    main()
