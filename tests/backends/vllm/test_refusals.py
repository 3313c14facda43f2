"""What vLLM is not served: by the name of the parameter, and with what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.serving_vllm import Pruned, half, model, packed
from torch import Tensor

from sparsify.files.checkpoint import Checkpoint
from sparsify.files.ledger import write_manifest

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")

Q = "model.layers.1.self_attn.q_proj.weight"


Spoil = Callable[[dict[str, Any], dict[str, Tensor]], None]


def _newer(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["format"] = 3


def _without(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q}_meta"]


def _code(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}_meta"][5, 3] = 0


def _cut(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}_meta"] = tensors[f"{Q}_meta"][:-1].clone()


def _narrow(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}_meta"] = tensors[f"{Q}_meta"].int()


def _without_a_dense_one(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.self_attn.v_proj.weight"]


def _foreign(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    other = Q.replace("q_proj", "g_proj")
    config["sites"][other] = config["sites"][Q]
    for part in ("", "_meta"):
        tensors[other + part] = tensors[Q + part].clone()


def _another(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    up = "model.layers.1.mlp.up_proj.weight"
    config["sites"][Q] = config["sites"][up]
    for part in ("", "_meta"):
        tensors[Q + part] = tensors[up + part].clone()


SPOILT: dict[str, tuple[Spoil, str]] = {
    "a newer format": (_newer, "format 3; this sparsify reads up to 2. Install a newer sparsify"),
    "a tensor too few": (_without, f"packed tensor {Q}_meta: "),
    "a dense tensor too few": (_without_a_dense_one, "v_proj.weight: the checkpoint does not hold it"),
    "codes of another dtype": (_narrow, f"packed tensor {Q}_meta: [128, 16] of torch.int32 where [128, 16]"),
    "a code that is none": (_code, f"packed tensor {Q}: a code that is not two ascending positions of four"),
    "a tensor cut off": (_cut, f"packed tensor {Q}_meta: [127, 16] of torch.uint8 where [128, 16]"),
    "weights of another model": (_another, f"packed parameter {Q}: [320, 128] where the model has [128, 128]"),
    "a site of another model": (_foreign, "model.layers.1.self_attn.g_proj.weight: no layer of vLLM's model reads it"),
}


def _cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _cut_within_its_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def _gone(file: Path) -> None:
    file.unlink()


def _other_bytes(file: Path) -> None:
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def _without_norms(file: Path) -> None:
    """That nothing but sparsify.json tells of: vLLM does not miss them."""
    tensors = load_file(file)
    write_manifest(file.parent, {}, Checkpoint(file.parent).digests())
    del tensors["model.layers.1.input_layernorm.weight"], tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})


# Files that are no whole ones, and how they are named.
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "bytes cut off": (_cut_off, "model.safetensors: not a sound safetensors file"),
    "a header cut off": (_cut_within_its_header, "model.safetensors: not a sound safetensors file"),
    "a pointer of Git LFS": (_other_bytes, "model.safetensors: a Git LFS pointer"),
    "norms too few": (_without_norms, "does not hold it, where sparsify.json says that it was written (2 missing)"),
    "no file": (_gone, "neither model.safetensors nor model.safetensors.index.json"),
}
# Families that vLLM reads in a way that takes something away, with what is pruned of them.
FAMILIES: dict[str, tuple[dict[str, Pruned], str]] = {
    "llama4": ({"k_proj": half}, "layers.0.self_attn.k_proj.weight: a bitmask, which has no rows"),
    "bloom": ({"query_key_value": half}, "h.0.self_attention.query_key_value.weight: a bitmask, which has no rows"),
}
SCRIPT = """
import sys, traceback
if __name__ == "__main__":
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    small = dict(gpu_memory_utilization=0.3, enforce_eager=True, skip_tokenizer_init=True)
    for folder in sys.argv[1:]:
        try:
            LLM(model=folder, distributed_executor_backend="uni", **small)
        except Exception as error:
            print("REFUSED", str(error).replace(chr(10), " "), flush=True)
        else:
            print("SERVED", folder, flush=True)
        cleanup_dist_env_and_memory()
"""


def refused(folders: list[Path], script: Path, **environment: str) -> list[str]:
    """What engines say, started one after the other in a process of their own."""
    script.write_text(SCRIPT)
    given = os.environ | environment
    done = subprocess.run([sys.executable, script, *folders], capture_output=True, text=True, timeout=400, env=given)
    told = [line for line in done.stdout.splitlines() if line.startswith(("REFUSED", "SERVED"))]
    assert len(told) == len(folders), done.stderr[-3000:]
    return told


def test_spoilt_folders_are_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    spoilt = []
    for name, (spoil, _) in SPOILT.items():
        folder = tmp_path / name.replace(" ", "_")
        shutil.copytree(folders["mixed"], folder)
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        spoil(config["quantization_config"], tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        spoilt.append(folder)
    for name, (broken, _) in BROKEN.items():
        spoilt.append(shutil.copytree(folders["mixed"], tmp_path / name.replace(" ", "_")))
        broken(spoilt[-1] / "model.safetensors")
        # Where config.json has none, vLLM itself looks for it in the header, before it asks a plug-in.
        config = json.loads((spoilt[-1] / "config.json").read_text()) | {"dtype": "float32"}
        (spoilt[-1] / "config.json").write_text(json.dumps(config))
    for family, (pruned, _) in FAMILIES.items():
        spoilt.append(packed(model(family, pruned), tmp_path / family))
    told = refused(spoilt, tmp_path / "refused.py")
    wanted = [*SPOILT.values(), *BROKEN.values(), *FAMILIES.values()]
    for line, (_, expected) in zip(told, wanted, strict=True):
        assert line.startswith("REFUSED") and expected in line


def test_without_plug_ins_vllm_knows_no_sparsify(folders: dict[str, Path], tmp_path: Path) -> None:
    (told,) = refused([folders["mixed"]], tmp_path / "refused.py", VLLM_PLUGINS="")
    # docs/serving.md quotes it.
    assert "Unknown quantization method: sparsify. Must be one of [" in told


def test_ranks_that_no_number_of_heads_divides(folders: dict[str, Path]) -> None:
    from vllm import EngineArgs

    args = EngineArgs(model=str(folders["mixed"]), tensor_parallel_size=3, skip_tokenizer_init=True)
    # vLLM's own words, before any process is started: docs/serving.md quotes them.
    with pytest.raises(
        ValueError, match=r"Total number of attention heads \(4\) must be divisible by tensor parallel size"
    ):
        args.create_engine_config()
