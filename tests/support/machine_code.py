"""The instructions that compilers make of GPU kernels, read by NVIDIA's disassembler."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest


def disassembler() -> list[Path]:
    """cuobjdump and nvdisasm: Triton's package brings both."""
    triton = pytest.importorskip("triton")
    place = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = [place / "cuobjdump", place / "nvdisasm"]
    if not all(p.exists() for p in found):
        pytest.skip("Triton's package has no cuobjdump and nvdisasm here")
    return found


def machine_code(binary: Path) -> dict[str, list[str]]:
    """Instructions of every kernel."""
    cuobjdump, nvdisasm = disassembler()
    done = subprocess.run(
        [cuobjdump, "--dump-sass", binary],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{nvdisasm.parent}:/usr/bin:/bin"},
    )
    kernels: dict[str, list[str]] = {}
    name = ""
    for line in done.stdout.splitlines():
        if (start := re.search(r"Function : (\w+)", line)) is not None:
            name = start[1]
        elif (word := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.x]+)", line)) is not None:
            kernels.setdefault(name, []).append(word[1])
    return kernels
