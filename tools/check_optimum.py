"""Load exported folders with optimum's ORTModelForCausalLM and compare its tokens with transformers'.

    python tools/check_optimum.py [--environment .venv-optimum]

optimum-onnx needs an older transformers than sparsify, so it runs in an environment of its own, made on the first call.
Families: the bundled Llama, Qwen2, OPT, GPT-2; linked and packed; a batch of two, one row padded on the left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import sparsify

ROOT = Path(__file__).parents[1]
TINY = {"vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
THEIRS = """
import json, sys
from pathlib import Path
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
failed = 0
for case in json.load(open(sys.argv[1])):
    options, library = onnxruntime.SessionOptions(), Path(case["folder"]) / "libsparsify_onnx.so"
    if case["registered"]:
        options.register_custom_ops_library(str(library))
    model = ORTModelForCausalLM.from_pretrained(case["folder"], session_options=options)
    model.generation_config.eos_token_id = None
    ids, mask = torch.tensor(case["ids"]), torch.tensor(case["mask"])
    got = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0).tolist()
    print(case["name"], "same" if got == case["want"] else f"OTHER: {got} for {case['want']}")
    failed += got != case["want"]
sys.exit(failed)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-optimum")
    args = parser.parse_args()
    python = environment(args.environment)
    with tempfile.TemporaryDirectory() as scratch:
        cases = export(Path(scratch))
        (Path(scratch) / "cases.json").write_text(json.dumps(cases))
        done = subprocess.run([python, "-W", "ignore", "-c", THEIRS, Path(scratch) / "cases.json"])
    sys.exit(done.returncode)


def environment(folder: Path) -> Path:
    """The Python of an environment with optimum-onnx."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for packages in (["torch==2.13.0"], ["optimum-onnx==0.1.0", "onnxruntime>=1.23"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return python


def export(scratch: Path) -> list[dict[str, Any]]:
    """Export each model and write down what transformers generates from the pruned weights."""
    torch.manual_seed(0)
    qwen2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    models = {
        "qwen2": hf.Qwen2ForCausalLM(hf.Qwen2Config(**TINY, **qwen2, intermediate_size=64)),
        "opt": hf.OPTForCausalLM(
            hf.OPTConfig(
                **TINY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
            )
        ),
        "gpt2": hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
        ),
    }
    folders = {"llama": ROOT / "models" / "pycode-6m"}
    for name, model in models.items():
        folders[name] = scratch / name
        model.save_pretrained(folders[name])
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cases = []
    for name, folder in folders.items():
        for mode in ("link", "packed", "sparse"):
            out = scratch / f"{name}-{mode}"
            result = sparsify.compile(folder, ["magnitude:2:4"], to=f"onnx:weights={mode}", output=out)
            pruned: Any = result.model.float()
            pruned.generation_config.eos_token_id = None
            want = pruned.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0)
            tokens = {"ids": ids.tolist(), "mask": mask.tolist(), "want": want.tolist()}
            for registered in (False, True) if mode == "sparse" else (False,):
                said = f"{name}, {mode}{' with the library in the folder' if registered else ''}"
                cases.append({"name": said, "folder": str(out), "registered": registered, **tokens})
    return cases


if __name__ == "__main__":
    main()
