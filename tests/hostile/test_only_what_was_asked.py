"""Python and programs that lie in a downloaded folder are not run, wherever a command is started."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.backends.bench.loading import measure_loading
from sparsify.errors import SparsifyError
from sparsify.import_path import environment, python
from sparsify.runtime.cpu import build
from sparsify.runtime.cuda import nvrtc

# Of ours, of what we need, of what we try to import, of the standard library.
NAMES = (
    "sparsify", "torch", "numpy", "transformers", "datasets", "pyarrow", "PIL", "triton", "peft", "accelerate",
    "safetensors", "rich", "typer", "onnx", "kernels", "json", "typing", "random", "hashlib", "subprocess", "tempfile",
    "logging", "inspect", "dataclasses", "__future__", "model", "modeling", "tokenization", "configuration", "setup",
)  # fmt: skip


@pytest.fixture
def planted(tmp_path: Path, folder: Callable[[str], Path]) -> Path:
    """A model's folder with a module of each of these names; ``ran`` appears in it when one of them is run."""
    place = tmp_path / "downloaded"
    shutil.copytree(folder("llama"), place)
    marker = tmp_path / "ran"
    for name in NAMES:
        (place / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write({name!r})\nraise SystemExit({name!r})\n")
    return place


def run(words: list[str], place: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, cwd=place, env=os.environ | changed, timeout=120, check=False
    )


# What the script of an installed package is.
SCRIPT = "import sys\nfrom sparsify.__main__ import main\nsys.exit(main())\n"


@pytest.mark.slow
def test_a_process_that_we_start(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(planted)
    for words in ("", os.pathsep, f"{os.pathsep}/none", f"/none{os.pathsep}"):
        monkeypatch.setenv("PYTHONPATH", words)
        if not words:
            assert measure_loading(Path()).seconds > 0
            continue
        # What lies on the path when it starts, and at no cost of loading a model.
        code = python("json.tool")
        code[-1] = code[-1].replace("from json.tool import main; main()", "print(sys.path)")
        said = run(code, planted, **{name: environment().get(name, "") for name in ("PYTHONPATH",)})
        assert str(planted) not in said.stdout and "''" not in said.stdout and said.returncode == 0
    assert not (planted.parent / "ran").exists()


@pytest.mark.parametrize("path", ["", os.pathsep, f"/none{os.pathsep}"])
def test_the_command_in_that_folder(planted: Path, tmp_path: Path, path: str) -> None:
    """Empty words in PYTHONPATH mean the working directory, and nobody means them."""
    script = tmp_path / "bin" / "sparsify"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    if path:
        # What Python itself looks for in PYTHONPATH when it starts, and the first line of the script, come before us.
        for name in (*sys.stdlib_module_names, "sparsify"):
            (planted / f"{name}.py").unlink(missing_ok=True)
    done = run([sys.executable, str(script), "passes"], planted, PYTHONPATH=path)
    assert done.returncode == 0 and "wanda" in done.stdout, done.stderr
    assert not (tmp_path / "ran").exists()


def test_as_a_module_in_that_folder(planted: Path, tmp_path: Path) -> None:
    """Python itself looks there for ``sparsify``, and for nothing more."""
    (planted / "sparsify.py").unlink()
    done = run([sys.executable, "-m", "sparsify", "passes"], planted)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("words", [["-m"], ["-Bm"], ["-P", "-m"], ["-I", "-m"]])
def test_what_is_named_in_pythonpath_stays(tmp_path: Path, words: list[str]) -> None:
    """The path of a process is otherwise as Python made it."""
    if "-P" in words and sys.version_info < (3, 11):
        pytest.skip("this Python has no -P")
    show = tmp_path / "show"
    show.mkdir()
    (show / "sitecustomize.py").write_text("import atexit, sys\natexit.register(lambda: print('PATH', sys.path))\n")
    path = os.pathsep.join([str(tmp_path), str(show)])
    done = run([sys.executable, *words, "sparsify", "--version"], tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    if "-I" not in words:
        known = done.stdout.partition("PATH ")[2]
        assert known.count(f"'{tmp_path}'") == 1 and known.count(f"'{show}'") == 1


CODE = """
open({marker!r}, "w").close()
from transformers import LlamaConfig as Own, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Words
"""
AUTO = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Words", "own.Words"]}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("command", ["inspect", "compile", "eval", "bench", "talk"])
def test_code_that_a_model_brings(
    file: str, command: str, tmp_path: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither run nor asked about: a yes that waits in the terminal's input is no --trust-remote-code."""
    from support.command_line import sparsify

    place = tmp_path / "model"
    shutil.copytree(bundled, place)
    (place / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    told = json.loads((place / file).read_text())
    told |= {"auto_map": AUTO, "custom_generate": "own"}
    if file == "config.json":
        told["model_type"] = "of-their-own"
    else:
        told["tokenizer_class"] = "OfTheirOwn"
    (place / file).write_text(json.dumps(told))
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    monkeypatch.chdir(place)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 400)
    if command == "talk":
        from sparsify.backends.onnx.running.talk import folder_tokenizer

        with contextlib.suppress(SparsifyError):
            folder_tokenizer(place)
    elif command == "bench":
        from sparsify.backends.packed.loaded.loading import load_model

        with contextlib.suppress(SparsifyError):
            load_model(place)
    else:
        words = {
            "inspect": ["inspect", place],
            "compile": [
                "compile", place, "--pass", "wanda:2:4", "--calibration", text, "--samples", 2, "--sequence-length", 16,
                "-o", tmp_path / "out",
            ],
            "eval": ["eval", place, "--data", text, "--windows", 2, "--sequence-length", 16],
        }  # fmt: skip
        done = sparsify(*words[command])
        assert done.returncode in (0, 1) and "unexpected" not in done.stderr, done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_data_set_is_no_script(tmp_path: Path, bundled: Path) -> None:
    from support.command_line import sparsify

    place = tmp_path / "set"
    place.mkdir()
    (place / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for words in (place, f"{place}:default", "set", "set:default:train"):
        done = sparsify("eval", bundled, "--data", words, "--windows", 2, "--sequence-length", 16, cwd=tmp_path)
        assert done.returncode == 1, done.stdout
    assert not (tmp_path / "ran").exists()


def test_a_compiler_that_lies_in_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty and relative words of PATH are passed over, also by the compiler that looks for its own programs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    for name in ("c++", "g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\ntouch ran\n")
        (tmp_path / name).chmod(0o755)
    for path in ("", ".", f"{os.pathsep}/none", f"/none{os.pathsep}"):
        monkeypatch.setenv("PATH", path)
        assert build.find_compiler() is None
        assert not {"", "."} & set(build.search_path().split(os.pathsep)) or build.search_path() == ""
    # Who names it has it, from whichever folder it is called.
    monkeypatch.setenv("CXX", "./g++ -m64")
    assert build.find_compiler() == [str(tmp_path / "g++"), "-m64"]


def test_no_library_of_nvidia_from_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = tmp_path / "nvidia" / "cuda_nvrtc" / "lib"
    lib.mkdir(parents=True)
    (lib / "libnvrtc.so.99").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not [place for place in nvrtc._candidates() if str(tmp_path) in place]
