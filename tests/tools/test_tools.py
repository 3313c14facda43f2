from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from make_checkpoint import make_checkpoint

import sparsify
from sparsify.files.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
SCRIPTS = sorted(str(path.relative_to(TOOLS)) for path in (*TOOLS.glob("*.py"), *TOOLS.glob("*/__main__.py")))


def test_a_made_checkpoint_is_sharded_and_prunes(tmp_path: Path) -> None:
    """What tools/bench_memory.py does at 26 GB, at 300 kB."""
    total = make_checkpoint(tmp_path / "model", "tiny", shard=100_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2 and total > 200_000
    result = sparsify.compile(
        tmp_path / "model",
        ["wanda:2:4"],
        calibration="random",
        samples=2,
        sequence_length=16,
        output=tmp_path / "out",
    )
    assert result.runs[0].kept == 0.5 and len(list(Checkpoint(tmp_path / "out").names())) == 4 * 9 + 3


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_no_file_is_longer_than_400_lines() -> None:
    long = {
        p.name: n
        for p in sources("sparsify", "passes", "backends", "tools")
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


def test_the_core_imports_no_pass_and_no_backend_and_a_pass_no_backend() -> None:
    for path in sources("sparsify"):
        text = path.read_text()
        assert "import sparsify.passes" not in text and "from sparsify.passes" not in text, path
        assert "from sparsify.backends" not in text, path
    assert not [p for p in sources("passes") if "sparsify.backends" in p.read_text()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_tools_explain_themselves(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run as a script, in this process, which has imported what they import."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(os, "environ", {**os.environ})
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / script), run_name="__main__")
    assert ended.value.code == 0 and script.removesuffix("/__main__.py") in capsys.readouterr().out


@pytest.mark.slow
def test_the_speed_of_a_run_is_measured() -> None:
    """tools/bench_prune.py at a size that takes a moment: it uses the engine's own entrance, which may change."""
    words = ["--layers", "1", "--samples", "2", "--length", "32", "--repeat", "1"]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "bench_prune.py", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("forward, 1 at once", "layer", "block", "dense"):
        assert name in done.stdout
