"""The results that are kept, and docs/architectures.md, which is made from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"
TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"

# Of several verdicts the first decides.
ORDER = ("wrong", "traceback", "crash", "timeout", "refused", "transformers fails", "not reached", "right")
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "hf": ("buffers", "capture", "masks", "untouched", "reload"), "packed": ("packed",), "onnx": ("onnx",),
    "structural": ("structural",),
}  # fmt: skip
_SAYS = {
    "right": "all its steps passed", "wrong": "a result that is not what was promised, and nothing was said",
    "refused": "our error, with its reason", "traceback": "another library's error came through ours",
    "crash": "the process died", "timeout": "took too long", "transformers fails": "transformers' own code failed",
    "not reached": "an earlier step left nothing to try it on", "–": "not tried yet",
}  # fmt: skip
_HEAD = """# Architectures

Made by `python tools/breadth table`; do not edit. One tiny model of each model type of transformers went through all
that sparsify does, in a process of its own. What each column says was compared, bit for bit or within rounding:

- **hf**: computed buffers of the skeleton with the real model's; the captured graph with the eager model, on other
  inputs than it was traced by; the masks of `wanda:2:4` with Wanda by plain hooks, and that every linear layer is
  pruned or named; what was not pruned, bit for bit; the output as transformers loads it with the pruned model in
  memory, no key missing.
- **packed**: the packed output as transformers loads it with the ordinary one.
- **onnx**: `sparsify verify` on the exported model finds it sound, and compared its outputs with torch's.
- **structural**: the smaller model of `llm-pruner:50%,importance=l2` with the dense one that has zeros there.

Of a model that reads text and images, text alone was given: the language model is pruned, the rest stays as it is. The
model is the one of the class in the second column, with random weights: this says that the compiler is right for the
architecture, nothing of how good a pruned model is.
"""


def installed() -> dict[str, str]:
    """The versions that a table is of."""
    import onnxruntime
    import torch
    import transformers

    return {own.__name__: own.__version__.partition("+")[0] for own in (onnxruntime, torch, transformers)}


def verdicts(result: Mapping[str, Any]) -> dict[str, str]:
    """Per column the worst verdict of its steps; "–" where none was tried."""
    found = {}
    for column, steps in COLUMNS.items():
        own = [result["steps"][s]["verdict"] for s in steps if s in result["steps"]]
        found[column] = min(own, key=ORDER.index) if len(own) == len(steps) or any(v != "right" for v in own) else "–"
    return found


def merge(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What lines of results say of each type; a step that was run again counts as it was the last time."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            old = found.get(one["kind"])
            if old is not None and "model" in one["steps"] and one["steps"]["model"]["verdict"] == "right":
                one["steps"] = old["steps"] | one["steps"]
            found[one["kind"]] = one
    return found


def compact(result: Mapping[str, Any]) -> dict[str, Any]:
    """A line of results without what differs from run to run."""
    steps = {
        name: {"verdict": step["verdict"]} | ({"reason": step["reason"]} if "reason" in step else {})
        for name, step in result["steps"].items()
    }
    model = result["steps"].get("model", {})
    more = {"class": model["class"], "inputs": sorted(model["inputs"])} if "class" in model else {}
    return more | {
        "steps": steps,
        "remarks": sorted(set(result.get("remarks", []))),
        "numbers": result.get("numbers", {}),
    }


def collect(files: Iterable[Path], date: str, versions: Mapping[str, str], types: Iterable[str]) -> None:
    """Write what is kept in the repository, with what was kept before where a type was not tried again."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"types": {}}
    if kept.get("versions") not in (None, dict(versions)):
        kept = {"types": {}}
    for kind, one in merge(files).items():
        new, old = compact(one), kept["types"].get(kind)
        if old is not None and new["steps"].get("model", {}).get("verdict") == "right":
            new["steps"] = old["steps"] | new["steps"]
        kept["types"][kind] = new
    left = sorted(set(types) - kept["types"].keys())
    lines = [f"{json.dumps(kind)}: {json.dumps(kept['types'][kind], sort_keys=True)}" for kind in sorted(kept["types"])]
    head = {"date": date, "versions": dict(versions), "left": left}
    # A line for each type, so that a change is seen where it is.
    RESULTS.write_text(json.dumps(head)[:-1] + ', "types": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def table() -> str:
    """docs/architectures.md."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    types, versions = kept["types"], kept["versions"]
    tried = {k: r for k, r in types.items() if r["steps"].get("model", {}).get("verdict") == "right"}
    rest = {k: r["steps"].get("model", {}).get("reason", "") for k, r in types.items() if k not in tried}
    found = {kind: verdicts(result) for kind, result in tried.items()}
    pinned = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    parts = [_HEAD, f"{kept['date']}; {pinned}.\n", _totals(found, len(rest), kept["left"])]
    parts.append(
        "| family | class | hf | packed | onnx | structural | remark |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    parts += [_row(kind, tried[kind], found[kind]) for kind in sorted(tried)]
    parts.append(
        "\n## Not tried\n\ntransformers has no class for it, or this installation builds or runs no tiny model of it.\n"
    )
    parts += [
        f"- {kind}: {_cell(reason, 160)}"
        for kind, reason in sorted(rest.items())
        if "no model of this config" not in reason and "another name" not in reason
    ]
    bare = [k for k, reason in sorted(rest.items()) if "no model of this config" in reason]
    same = [
        f"{k} ({reason.removeprefix('another name of ')})"
        for k, reason in sorted(rest.items())
        if "another name" in reason
    ]
    parts.append(f"\nConfigs of parts, for which no auto-class names a model: {', '.join(bare) or 'none'}.")
    parts.append(f"\nOther names of types above: {', '.join(same) or 'none'}.")
    if kept["left"]:
        parts.append(f"\nNot tried yet: {', '.join(kept['left'])}.")
    return "\n".join(parts) + "\n"


def _totals(found: Mapping[str, Mapping[str, str]], rest: int, left: list[str]) -> str:
    lines = ["| | " + " | ".join(COLUMNS) + " | |", "| --- |" + " --- |" * len(COLUMNS) + " --- |"]
    for verdict in (*reversed(ORDER), "–"):
        counts = [sum(f[column] == verdict for f in found.values()) for column in COLUMNS]
        if any(counts):
            lines.append(f"| **{verdict}** | " + " | ".join(map(str, counts)) + f" | {_SAYS[verdict]} |")
    more = f"; {len(left)} others have not been tried yet" if left else ""
    return (
        f"{len(found)} types were tried, {rest} could not be{more} (both lists are at the end).\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _row(kind: str, result: Mapping[str, Any], found: Mapping[str, str]) -> str:
    said = []
    for column, steps in COLUMNS.items():
        for step in steps:
            own = result["steps"].get(step)
            if own is not None and own["verdict"] not in ("right", "not reached"):
                said.append(f"{step if column == 'hf' else column}: {own.get('reason', '')}")
    numbers = result["numbers"]
    if numbers.get("unreached"):
        said.append(f"{numbers['unreached']} linear layers are not in the traced part")
    said += result["remarks"]
    once = Counter(said)
    remark = "; ".join(_cell(text, 200) for text in once)
    marks = [f"**{v}**" if v in ("wrong", "traceback", "crash") else v for v in found.values()]
    return f"| {kind} | {result['class']} | {' | '.join(marks)} | {remark} |"


def _cell(text: str, most: int) -> str:
    """Text that is safe in a cell of a table, and no longer than that."""
    plain = " ".join(text.replace("|", "/").replace("<", "‹").replace(">", "›").replace("`", "'").split())
    return plain if len(plain) <= most else plain[: most - 1] + "…"
