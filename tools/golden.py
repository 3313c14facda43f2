"""Hold the outputs of one version of the code against those of another, byte by byte.

    python tools/golden.py write FILE.json [--only TEXT]     # digests of what this version writes
    python tools/golden.py compare FILE.json [--only TEXT]   # the same again, and where it differs

The bundled model and six families under a dozen pass specs, written as hf, packed and onnx folders; what ``inspect``
says of each, and what every refusal says. A run is one thread and one process, so that sums are added in one order;
the figures hold on one machine with one torch. Change how things are done, and this must say "no difference".
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import onnx  # noqa: E402
import torch  # noqa: E402
from support.families import inputs, save  # noqa: E402

import sparsify  # noqa: E402
from sparsify.errors import SparsifyError  # noqa: E402

BUNDLED = "pycode-6m"
FAMILIES = ("llama", "gpt2", "mixtral", "opt", "t5", "vit")
# Passes of a compile, then options of compile().
COMPILES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "magnitude": (["magnitude:50%"], {}),
    "wanda": (["wanda:2:4"], {}),
    "wanda-block": (["wanda:50%,group=input,blocksize=8"], {"schedule": "block"}),
    "wanda-owl": (["wanda:60%,allocation=owl"], {}),
    "wanda-only": (["wanda:2:4"], {"only": ["*q_proj", "*c_attn", "*.q", "*query"]}),
    "sparsegpt": (["sparsegpt:2:4,compensation=exact"], {"schedule": "block"}),
    "apt": (["apt:2:4,mask=M"], {}),
    "alps": (["alps:4:8"], {"schedule": "dense"}),
    "twin": (["wanda:2:4", "twin:2:4,mask=zeros"], {}),
    "gblm": (["gblm:2:4"], {}),
    "gradient": (["gradient:50%,metric=platon"], {}),
    "activation": (["activation:25%,metric=correlation"], {}),
    "smaller": (["llm-pruner:25%", "wanda:2:4"], {}),
    "ragged": (["llm-pruner:50%,importance=l2,widths=ragged,keep_first=1"], {}),
    "fewer": (["llm-pruner:50%,importance=l1,granularity=layer"], {}),
}
TARGETS = ("hf", "packed:choice=smallest", "onnx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="golden-") as place:
        found = dict(cases(Path(place), args.only))
    print(f"{len(found)} cases in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if args.do == "write":
        args.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    lines = list(differences(json.loads(args.file.read_text(encoding="utf-8")), found, args.only))
    print("\n".join(lines) or "no difference")
    sys.exit(bool(lines))


def cases(place: Path, only: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and digests of every case whose name contains ``only``."""
    for model in (BUNDLED, *FAMILIES):
        folder = ROOT / "models" / BUNDLED if model == BUNDLED else save(model, place / model)
        for what, report in _reports(folder).items():
            if only in (name := f"{model} {what}"):
                yield name, _tried(report)
        for key, (passes, options) in COMPILES.items():
            for target in TARGETS:
                if only in (name := f"{model} {key} {target.partition(':')[0]}"):
                    yield name, _tried(_compiling(model, folder, passes, target, options, place / "out"))


def differences(before: dict[str, Any], after: dict[str, Any], only: str) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys()):
        if only not in name:
            continue
        one, other = before.get(name, {}), after.get(name, {})
        for file in sorted(one.keys() | other.keys()):
            if one.get(file) != other.get(file):
                yield f"{name}: {file}: {one.get(file, 'not there')} → {other.get(file, 'not there')}"


def _tried(make: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return make()
    except SparsifyError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _reports(folder: Path) -> dict[str, Callable[[], dict[str, str]]]:
    from sparsify.cli.main import main as command

    def printed(*words: str) -> Callable[[], dict[str, str]]:
        def run() -> dict[str, str]:
            import contextlib
            import io

            out, argv = io.StringIO(), sys.argv
            sys.argv = ["sparsify", *words]
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                command()
            sys.argv = argv
            return {"printed": _digest(out.getvalue().replace(str(folder), "MODEL").encode())}

        return run

    return {
        "inspect": printed("inspect", str(folder), "--json"),
        "dimensions": printed("inspect", str(folder), "--dimensions", "--json"),
        "dot": printed("inspect", str(folder)),
    }


def _compiling(
    model: str, folder: Path, passes: list[str], target: str, options: dict[str, Any], out: Path
) -> Callable[[], dict[str, str]]:
    def run() -> dict[str, str]:
        if model == BUNDLED:
            data: Any = {"calibration": "python-stdlib", "samples": 4, "sequence_length": 32}
        else:
            data = {"calibration": [inputs(model, rows=4, seed=1)]}
        # A family has no tokenizer and its weights are noise: onnx checks both sides by running them.
        result = sparsify.compile(folder, passes, output=out, to=target, overwrite=True, **data, **options)
        assert result.output is not None
        files = sorted(p for p in result.output.rglob("*") if p.is_file())
        found = {p.relative_to(result.output).as_posix(): _digest(_content(p)) for p in files}
        return found | {"notes": "\n".join(result.notes)}

    return run


def _content(path: Path) -> bytes:
    """The bytes of a file; of a manifest all but what a clock says, of a graph whatever the order of its tensors."""
    if path.suffix == ".onnx":
        model = onnx.load(path, load_external_data=False)
        ordered = sorted(model.graph.initializer, key=lambda tensor: tensor.name)
        del model.graph.initializer[:]
        model.graph.initializer.extend(ordered)
        return model.SerializeToString(deterministic=True)
    if path.name != "sparsify.json":
        return path.read_bytes()
    return json.dumps(_timeless(json.loads(path.read_text(encoding="utf-8")))).encode()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in ("seconds", "timing", "memory")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


if __name__ == "__main__":
    main()
