"""``sparsify.json``: its name, its version, reading and writing it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError

FORMAT = 1
MANIFEST = "sparsify.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """``sparsify.json`` of ``folder``; empty where there is none.

    Raises:
        CheckpointError: it is no JSON.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST}", found=f"not JSON ({error})", do="Compile again") from error


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Put ``sparsify.json`` into ``folder``."""
    write_json(folder / MANIFEST, manifest)


def write_json(path: Path, content: Any) -> None:
    """As transformers and people write it: indented, every language as it is."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
