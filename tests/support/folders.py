"""Folders as their users meet them: written at the command line or from Python, and loaded by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from support.families import save

import sparsify
from sparsify.backends.packed.backend import PackedBackend

SMALLEST = PackedBackend(choice="smallest")


def load(folder: Path, **options: Any) -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **options).eval()


def write_both(family: str, folder: Path, spec: str = "magnitude:2:4", **options: Any) -> tuple[Path, Path]:
    """The pruned model as an ordinary folder and as a packed one."""
    save(family, folder / "dense", **options)
    sparsify.compile(folder / "dense", [spec], output=folder / "hf")
    sparsify.compile(folder / "dense", [spec], output=folder / "packed", to=SMALLEST)
    return folder / "hf", folder / "packed"


def same_files(one: Path, other: Path) -> bool:
    names = sorted(p.name for p in one.iterdir() if "safetensors" in p.name)
    return names == sorted(p.name for p in other.iterdir() if "safetensors" in p.name) and all(
        (one / n).read_bytes() == (other / n).read_bytes() for n in names if n.endswith(".safetensors")
    )
