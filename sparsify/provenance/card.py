"""``README.md`` of an output: a model card of what lies there, by its manifest; the dense model's card beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sparsify.files.reading import kind_at, read_json
from sparsify.provenance.commands import commands_of
from sparsify.provenance.dense_card import CARD, kept_header, set_aside
from sparsify.provenance.figures import figures_of
from sparsify.provenance.loading import Kind, kind_of
from sparsify.provenance.markdown import block, code, short, table
from sparsify.provenance.runs import held_pattern, whole_of

# Reasons and names that are told before the rest is counted.
_REASONS, _NAMES = 12, 3


def write_card(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the card of the finished ``folder``, and note it in its ``manifest``, which is not written yet.

    A card that came along from the dense model stays beside it under another name: it speaks of that model.
    """
    dense = set_aside(folder, manifest)
    manifest["card"] = {"dense": dense}
    config = read_json(folder / "config.json") if kind_at(folder / "config.json") == "file" else {}
    kind = kind_of(folder, config, manifest)
    header = {} if dense is None else kept_header(folder / dense)
    text = f"---\n{_header(manifest, header, kind)}\n---\n\n{_body(manifest, dense, kind)}"
    (folder / CARD).write_text(text, encoding="utf-8")


def _header(manifest: Mapping[str, Any], dense: Mapping[str, Any], kind: Kind) -> str:
    from huggingface_hub import ModelCardData

    ran = [own for run in _history(manifest) for own in run.get("passes", ()) if "rounded" not in own]
    sites = (site for own in manifest.get("passes", ()) for site in (*own["sites"], *own.get("rounded", ())))
    # The zeros of an earlier step are still there, whatever this one did.
    patterns = {site.get("pattern") for site in sites} | {held_pattern(own) for own in ran}
    tags = ["sparsify", *(["pruned"] if ran else []), *sorted(short(p) for p in patterns if p)[:8]]
    tags += [run["command"] for run in _history(manifest) if run["command"] == "tune"][:1]
    content = ModelCardData(
        base_model=_base(manifest, kind), library_name=kind.library, tags=[*tags, *kind.tags], **dense
    )
    text: str = content.to_yaml(line_break="\n")
    return text


def _body(manifest: Mapping[str, Any], dense: str | None, kind: Kind) -> str:
    base, history = _base(manifest, kind), _history(manifest)
    what = kind.what(any("rounded" not in own for run in history for own in run.get("passes", ())))
    parts = [f"# {'A model' if base is None else code(base)}, {what}"]
    parts.append(f"Made {'' if base is None else f'of {code(base)} '}by sparsify (`pip install sparsify-fx`).")
    if dense is not None:
        parts[-1] += f" [Its own card]({quote(dense)}): what is measured there holds of that model, not of this one."
    if rows := [row for number, run in enumerate(history, 1) for row in _rows(number, run)]:
        parts += ["## What was done", table(_HEAD, rows)]
        if (left := _whole(history)) is not None:
            parts.append(left)
        parts.append("`sparsify.json` beside this file has every option, site and digest.")
    if left_dense := _dense(manifest):
        several = sum(bool(run.get("passes")) for run in history) > 1
        parts.append("## What the last step that pruned left as it was" if several else "## What stayed dense")
        parts.append(table(("why", "how many", "which"), left_dense))
    parts += ["## Measured", *_measured(manifest, history)]
    parts += ["## How to load it", *kind.loading]
    if history:
        parts += ["## How to make it again", *_again(history)]
    return "\n\n".join(parts) + "\n"


def _history(manifest: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = manifest.get("history", ())
    return found


def _base(manifest: Mapping[str, Any], kind: Kind) -> str | None:
    """What the first run of all was given; an adapter's base is what the last was given."""
    history = _history(manifest)
    if not history:
        return None
    return short(history[-1 if kind.library == "peft" else 0].get("source", {}).get("name") or "") or None


_HEAD = ("step", "what", "weights", "kept of them", "mean output error", "with")


def _rows(number: int, run: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line to each pass, and to a run without any."""
    data = run.get("calibration") or {}
    told = run.get("data") or (data.get("data") if isinstance(data, Mapping) else None)
    source = "" if told is None else code(told, cell=True)
    passes = run.get("passes") or [{"spec": run["command"]}]
    rows: list[tuple[str, ...]] = []
    for own in passes:
        before, after = own.get("parameters", (None, None))
        sites = "" if before is None else f"{before:,} → {after:,} numbers"
        sites = str(own["pruned"]) if "pruned" in own else f"{own['rounded']} rounded" if "rounded" in own else sites
        kept, error = None if "rounded" in own else own.get("left"), own.get("error")
        figures = ("" if kept is None else f"{kept:.2%}", "" if error is None else f"{error:.4f}")
        rows.append((str(number), code(own.get("spec", ""), cell=True), sites, *figures, source))
    return rows


def _whole(history: Sequence[Mapping[str, Any]]) -> str | None:
    """How much is left of the whole model, as the last run that pruned found it."""
    whole = whole_of(history)
    if whole is None:
        return None
    return f"In all {whole['kept']:.2%} of the model's {whole['numbers']:,} numbers are not zero."


def _dense(manifest: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Why weights were left as they were by the passes of the last run, and which."""
    reasons: dict[str, list[str]] = {}
    for own in manifest.get("passes", ()):
        for skipped in own.get("skipped", ()):
            reasons.setdefault(str(skipped.get("reason")), []).append(str(skipped.get("name")))
    rows: list[tuple[str, ...]] = []
    for reason, names in list(reasons.items())[:_REASONS]:
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        rows.append((code(reason, cell=True), str(len(names)), ", ".join(code(n, True) for n in names[:_NAMES]) + more))
    return rows


def _measured(manifest: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for figure in figures_of(manifest):
        if figure.before is not None and figure.after is not None:
            when = figure.what if figure.step is None else f"before and after step {figure.step}"
            verdict = f", {code(figure.verdict)}" if figure.verdict else ""
            lines.append(
                f"- Perplexity on {code(figure.data)}, {when}: {figure.before:.3f} → {figure.after:.3f}{verdict}."
            )
    if any("error" in own for run in history for own in run.get("passes", ())):
        said = "‖XWᵀ − XŴᵀ‖ / ‖XWᵀ‖ over the data of its step, the mean of its layers"
        lines.append(f"- The output error of the table is {said}.")
    measured = "\n".join(lines)
    if any(line.startswith("- Perplexity") for line in lines):
        return [measured]
    unknown = "What it lost in quality was not measured when it was written: `sparsify eval MODEL FOLDER --data DATA`."
    return [measured, unknown] if lines else [unknown]


def _again(history: Sequence[Mapping[str, Any]]) -> list[str]:
    lines, missing = [], []
    for number, (run, command) in enumerate(zip(history, commands_of(history), strict=True), 1):
        if command is None:
            missing.append(str(number))
            lines.append(f"# step {number}: {'; '.join(str(own.get('spec')) for own in run.get('passes', ()))}")
        else:
            lines += [f"# step {number}", command] if len(history) > 1 else [command]
    said = [block(lines, "sh")]
    if missing:
        said.append(
            f"Of step {', '.join(missing)} there is no command line: a pass has names of its own, or data or a model "
            "were in the memory of Python. Where `sparsify.json` has a `recipe` of it, `sparsify compile --recipe` "
            "takes that."
        )
    used = history[-1].get("versions", {})
    return [*said, f"Versions: {', '.join(f'{code(name)} {code(number)}' for name, number in used.items())}."]
