"""What ``sparsify verify`` prints: weights by kind, what is wrong, and which runtime gains what."""

from __future__ import annotations

import re

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsify.backends.verify.result import Verification, WeightCheck
from sparsify.cli.tables import shared_prefix
from sparsify.runtime.words import LAYOUTS


def verification_report(result: Verification) -> RenderableType:
    """A table of the weights, one of the runtimes, then the verdict."""
    parts: list[RenderableType] = [_weights(result), _runtimes(result)]
    parts += [Text(f"not checked: {what}", "yellow") for what in _few(result.unchecked)]
    if result.behaviour is not None:
        seen = result.behaviour
        same = f", {seen.agreeing} of {seen.tokens} greedy tokens the same" if seen.tokens else ""
        parts.append(Text(f"outputs: within {seen.difference:.1e} of torch's, relative to their size{same}"))
    what = "with what onnxruntime gives back" if result.opset else "with the checksums of sparsify.json"
    beside = f", {result.files} files beside them with sparsify.json" if result.files else ""
    parts.append(Text(f"weights: {result.compared} compared bit for bit {what}{beside}"))
    parts += [Text(problem, "bold red") for problem in _few(result.problems, 10)]
    verdict = f"{result.file}: sound" if result.sound else f"{result.file}: {len(result.problems)} problems"
    parts.append(Text(verdict, "green" if result.sound else "bold red"))
    return Group(*parts)


def _weights(result: Verification) -> Table:
    kinds: dict[str, list[WeightCheck]] = {}
    for weight in result.weights:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", weight.name.removesuffix(".weight")), []).append(weight)
    blocks = [kind for kind in kinds if ".*." in kind]
    prefix = shared_prefix(blocks)
    opset = f"opset {result.opset}: " if result.opset else ""
    title = f"{opset}weights by kind" + (f" ({prefix}…)" if prefix else "")
    table = Table(title=title, title_justify="left", caption_justify="left")
    given = "onnxruntime gives the checkpoint's bits" if result.opset else "the bits that were written"
    table.caption = f"axis: the one summed over; =: {given}; TRT: TensorRT's 2:4 kernels may take it"
    table.add_column("weight", overflow="fold")
    for column in ("n", "shape", "stored", "axis", "zeros", "N:M", "=", "TRT"):
        table.add_column(column, justify="right", overflow="fold")
    for kind, rows in kinds.items():
        shapes = sorted({"×".join(map(str, r.shape)) for r in rows})
        zeros = [r.zeros for r in rows]
        spread = f"{min(zeros):.1%}" if max(zeros) - min(zeros) < 5e-4 else f"{min(zeros):.1%}–{max(zeros):.1%}"
        equal = {True: "yes", False: "NO", None: "–"}
        states = sorted({equal[r.equal] for r in rows})
        able = sum(r.tensorrt is None for r in rows)
        table.add_row(
            kind.removeprefix(prefix),
            str(len(rows)),
            ", ".join(shapes),
            ", ".join(sorted({_stored(r) for r in rows})),
            ", ".join(sorted({str(r.axis) for r in rows})),
            spread,
            ", ".join(sorted({r.pattern or "–" for r in rows})),
            ", ".join(states),
            f"{able}/{len(rows)}",
        )
    return table


def _stored(row: WeightCheck) -> str:
    short = row.dtype.replace("bfloat", "bf").replace("float", "f")
    return short if row.format == "dense" else f"{row.format} {short}"


def _runtimes(result: Verification) -> Table:
    sparse = sum(w.zeros > 0.25 for w in result.weights)
    able = sum(w.tensorrt is None for w in result.weights)
    why = sorted({w.tensorrt for w in result.weights if w.tensorrt and w.tensorrt != "not 2:4"})
    table = Table(title="who gains what from the zeros", title_justify="left")
    table.add_column("runtime")
    table.add_column("gain", overflow="fold")
    packed = any(w.format.split()[0] in LAYOUTS or w.format.startswith("dense int") for w in result.weights)
    if packed and not result.opset:
        gain = "smaller files and memory, and a faster token on CPUs: sparsify bench measures it here"
        table.add_row("transformers, after import sparsify; vLLM with sparsify installed; sparsify serve", gain)
        table.add_row("every other runtime", "none before sparsify unpack, which makes an ordinary checkpoint")
        return table
    disk = (
        "a smaller file, unpacked to dense when a session is made" if result.packed else "none: same file, same speed"
    )
    if result.sparse:
        ours = "smaller memory, and a faster token: sparsify bench measures it here"
        table.add_row("onnxruntime on a CPU with sparsify.onnx_library(), onnxruntime-genai on this folder", ours)
        table.add_row("onnxruntime without it", f"{disk}; dense speed")
    else:
        table.add_row("onnxruntime, CPU and CUDA", f"{disk}; its MatMul and Gemm take as long with zeros as without")
    trt = f"{able} of {sparse} sparse weights are 2:4 along the summed axis, 2-D and aligned"
    if why:
        trt += f"; the others: {'; '.join(why[:2])}"
    trt += (
        ". With --sparsity=enable (trt_sparsity_enable) its builder may pick sparse kernels, only where they are faster"
    )
    if result.packed:
        trt += "; run sparsify expand first"
    table.add_row("TensorRT", trt if able else "none: no weight that its sparse kernels take")
    others = "transformers, optimum" if result.sparse else "transformers, optimum, genai"
    table.add_row(others, "none: dense speed" if sparse else "none")
    table.add_row(
        "transport (zstd, zip)", "zeros compress: about 0.55 to 0.6 of the size at half zeros" if sparse else "none"
    )
    return table


def _few(lines: list[str], most: int = 5) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]
