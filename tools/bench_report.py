"""What a page about a large model costs: CPU seconds of ``sparsify report`` in a process of its own.

    python tools/bench_report.py [--layers 80] [--runs 5] [--keep FOLDER]

The folder is a manifest as a compile of a model with so many layers of seven matrices writes it, without the weights,
which no report reads. --keep: leave the folder and its page there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sparsify.files.manifest import FORMAT, MANIFEST, digest_of_manifest, write_json

SHAPES = {
    "self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (1024, 8192), "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192), "mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}  # fmt: skip


def manifest_of(layers: int) -> dict[str, Any]:
    """What a compile writes of a model with so many ``layers``; down_proj of the last eight is left dense."""
    sites: list[dict[str, Any]] = []
    skipped = [{"name": "lm_head", "reason": "the output head"}]
    for layer in range(layers):
        for place, (kind, shape) in enumerate(SHAPES.items()):
            name = f"model.layers.{layer}.{kind}"
            if kind == "mlp.down_proj" and layer >= layers - 8:
                skipped.append({"name": name, "reason": "named by --ignore"})
                continue
            error = 0.08 + 0.12 * layer / layers + 0.03 * math.sin(layer + 2 * place)
            site = {"name": name, "tensors": [f"{name}.weight"], "shape": list(shape), "pattern": "2:4"}
            sites.append({**site, "kept": 0.5, "error": error, "tokens": 262144})
    digests = {"tensors": {f"{s['name']}.weight": f"{n:064x}" for n, s in enumerate(sites)}, "headers": {}, "files": {}}
    versions = {"sparsify-fx": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "python": "3.11.7"}
    data = {"data": "c4", "sequences": 128, "sequence_length": 2048, "seed": 0, "sha256": "ab" * 32}
    ran = {"spec": "wanda:2:4", "pruned": len(sites), "left": 0.5, "error": statistics.fmean(s["error"] for s in sites)}
    run = {
        "command": "compile", "date": "2026-11-27T09:52:44Z", "source": {"name": "org/large", "weights": "cd" * 32},
        "passes": [ran], "calibration": data, "recipe": {"model": "org/large", "passes": ["wanda:2:4"]},
        "whole": {"numbers": 70_553_706_496, "kept": 0.53}, "versions": versions,
    }  # fmt: skip
    content: dict[str, Any] = {
        "format": FORMAT, "model": "large", "source_check": "none", "versions": versions, "history": [run],
        "passes": [{**ran, "name": "wanda", "options": {"pattern": "2:4"}, "sites": sites, "skipped": skipped}],
        "calibration": data, "digests": {"algorithm": "blake2b-256", **digests},
    }  # fmt: skip
    content["digests"] = {"manifest": digest_of_manifest(content), **content["digests"]}
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        place = asked.keep or Path(made)
        place.mkdir(parents=True, exist_ok=True)
        content = manifest_of(asked.layers)
        write_json(place / MANIFEST, content)
        page = place.parent / f"{place.name}.html"
        seconds = [
            _cpu_of([sys.executable, "-m", "sparsify", "report", place, "-o", page, "--overwrite"])
            for _ in range(asked.runs)
        ]
        sites = len(content["passes"][0]["sites"])
        result = {
            "layers": asked.layers,
            "sites": sites,
            "cpu_seconds": statistics.median(seconds),
            "bytes": page.stat().st_size,
        }
        print(json.dumps(result))
        if asked.keep is None:
            page.unlink()


def _cpu_of(command: list[Any]) -> float:
    before = os.times()
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
