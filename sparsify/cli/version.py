"""``sparsify version``: ours, and of what it runs on. Imports none of it."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version

from sparsify.cli.options import AsJson
from sparsify.cli.terminal import say

_PACKAGES = ("torch", "transformers", "safetensors", "onnx", "onnxruntime", "peft", "datasets")


def version_command(as_json: AsJson = False) -> None:
    """Print the version of sparsify, Python and the libraries that it runs on."""
    found = {"sparsify-fx": version("sparsify-fx"), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    say(json.dumps(found) if as_json else "\n".join(f"{name} {number}" for name, number in found.items()), lines=True)
