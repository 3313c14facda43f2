"""What a run found, in one file that is whole after every step; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAILED = "failed"
# The exit status of a part whose GPU has lost its context: start it again.
LOST = 75


@dataclass(frozen=True)
class Results:
    """``results.json`` in ``out``, with the same text in ``kept``, which outlives ``out`` on a machine that stays.

    ``parts``: part to steps, step to what was found: a mapping, with the key ``failed`` where it did not get through.
    """

    out: Path
    kept: Path

    @property
    def path(self) -> Path:
        return self.out / "results.json"

    def begin(self, emulated: bool, resumed: bool) -> None:
        """Empty, or as an earlier run on this machine left them."""
        self.out.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {"emulated": emulated, "parts": {}}
        if not resumed:
            (self.out / "log.txt").unlink(missing_ok=True)
        elif self.kept.exists():
            before = json.loads(self.kept.read_text(encoding="utf-8"))
            if before["emulated"] == emulated:
                content = before
        self._write(content)

    def read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return content

    def part(self, name: str) -> dict[str, Any]:
        steps: dict[str, Any] = self.read()["parts"].get(name, {})
        return steps

    def forget(self, part: str) -> None:
        content = self.read()
        content["parts"].pop(part, None)
        self._write(content)

    def record(self, part: str, step: str, found: Mapping[str, Any]) -> None:
        content = self.read()
        content["parts"].setdefault(part, {})[step] = dict(found)
        self._write(content)

    def _write(self, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=1) + "\n"
        for path in (self.path, self.kept):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}")
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
