"""Whether a GPU prunes what a CPU prunes: every method on a small random model on both, and the command line itself."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import Found, Machine, Step
from results import Results
from torch import Tensor

import sparsify
from sparsify.frontend.source import open_source

# What is run, and the least share of its entries that must come out the same: products round otherwise on a GPU, and a
# method that updates weights carries that on (an H200: 0.93 of ALPS's, 0.92 of twin's).
METHODS: dict[str, tuple[list[str], float]] = {
    "magnitude": (["magnitude:2:4"], 0.99),
    "wanda": (["wanda:2:4"], 0.99),
    "wanda by owl": (["wanda:60%,allocation=owl"], 0.95),
    "activation": (["activation:25%"], 0.95),
    "sparsegpt": (["sparsegpt:2:4"], 0.95),
    "apt": (["apt:2:4"], 0.95),
    "alps": (["alps:2:4"], 0.9),
    "twin": (["twin:2:4"], 0.9),
    "gblm": (["gblm:2:4"], 0.95),
    "gradient": (["gradient:50%"], 0.95),
    "wanda and refine": (["wanda:2:4", "refine:epochs=1,rate=0.01"], 0.95),
    "permute": (["permute:2:4"], 0.995),
    "llm-pruner": (["llm-pruner:25%"], 0.95),
}
# These leave no zeros. Which weight lies where tells what the one chose; the other searches among orders that are
# all but equally good (an H200: 0.80 of the entries), so that what its order is worth is compared.
_BY_PLACE, _BY_WORTH = {"llm-pruner"}, {"permute"}
_SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
_BUNDLED = Path(__file__).parents[3] / "models" / "pycode-6m"


def steps(machine: Machine, results: Results) -> list[Step]:
    each: list[Step] = [(f"{name} on both", partial(compare, machine, name)) for name in METHODS]
    return [("command line", partial(command_line, machine, results.kept.parent)), *each]


def compare(machine: Machine, name: str) -> Found:
    """``share`` of the entries of all pruned weights that are the same, zero or not, on the GPU and on the CPU."""
    import transformers

    specs, bar = METHODS[name]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SMALL)).eval()
    data = [torch.randint(_SMALL["vocab_size"], (1, 128)) for _ in range(8)]
    found = [
        sparsify.compile(model, specs, calibration=data, device=str(device))
        for device in (machine.device, torch.device("cpu"))
    ]
    there, here = (dict(one.model.named_parameters()) for one in found)
    if name in _BY_WORTH:
        one, other = (worth([p for p in params.values() if p.dim() == 2]) for params in (there, here))
        return {"share": at_least(min(one, other) / max(one, other), bar), "bar": bar, "worth": [one, other]}
    pruned = [n for n in here if not torch.equal(here[n], model.get_parameter(n))] if name not in _BY_PLACE else [*here]
    share = same({n: there[n] for n in pruned}, {n: here[n] for n in pruned}, name in _BY_PLACE)
    return {"share": at_least(share, bar), "bar": bar, "weights": len(pruned)}


def command_line(machine: Machine, work: Path) -> Found:
    """The bundled model pruned by the command on the GPU and on the CPU, and both read by `eval` on the GPU."""
    place, work, folders = str(machine.device), work.resolve(), {}
    for device in (place, "cpu"):
        # On a CPU that emulates a GPU both are the same device.
        folders[device] = work / f"pycode-24-{device.replace(':', '-')}"
        _run("compile", _BUNDLED, "--pass", "wanda:2:4", "--calibration", "python-stdlib", "--samples", 16,
             "--sequence-length", 128, "--device", device, "-o", folders[device], "--overwrite", "-q")  # fmt: skip
    there, here = (_weights(folders[device]) for device in (place, "cpu"))
    said = _run("eval", _BUNDLED, folders[place], folders["cpu"], "--data", "python-stdlib", "--sequence-length", 128,
                "--windows", 32, "--device", place, "--json", "-q")  # fmt: skip
    share = at_least(same(there, here, False), 0.95)
    perplexities = [float(model["perplexity"]) for model in json.loads(said)]
    dense, gpu, cpu = perplexities
    if not dense < gpu or abs(gpu / cpu - 1) > 0.02:
        raise AssertionError(f"perplexity {dense} dense, {gpu} pruned on {place}, {cpu} on the CPU")
    return {"share": share, "bar": 0.95, "perplexities": perplexities}


def same(one: dict[str, Tensor], other: dict[str, Tensor], by_place: bool) -> float:
    """The share of entries that are zero in both or in neither; or that are the same number."""
    if not one or one.keys() != other.keys() or any(one[n].shape != other[n].shape for n in one):
        raise AssertionError(f"other weights: {len(one)} and {len(other)}, or of other shapes")
    alike = [(one[n].cpu() == other[n]) if by_place else ((one[n].cpu() == 0) == (other[n] == 0)) for n in one]
    return sum(int(a.sum()) for a in alike) / sum(a.numel() for a in alike)


def worth(weights: list[Tensor]) -> float:
    """The magnitude that 2:4 keeps of ``weights``, as a share of all."""
    kept = sum(float(w.abs().unflatten(1, (-1, 4)).topk(2, dim=2).values.sum()) for w in weights)
    return kept / sum(float(w.abs().sum()) for w in weights)


def at_least(share: float, bar: float) -> float:
    if share < bar:
        raise AssertionError(f"only {share:.4f} of the entries are those of the CPU, and {bar} should be")
    return share


def _weights(folder: Path) -> dict[str, Tensor]:
    weights = open_source(folder).weights
    read: dict[str, Any] = {name: weights.read(name) for name in weights.parameters()}
    # The pruned ones: half of the entries of every matrix in a block.
    return {name: value for name, value in read.items() if ".layers." in name and value.dim() == 2}


def _run(*words: object) -> str:
    """What a command of ours prints."""
    # Not from the checkout, where `python -m` would find `sparsify` without its passes before the import tree.
    done = subprocess.run(
        [sys.executable, "-m", "sparsify", *map(str, words)], capture_output=True, text=True, check=False, cwd="/"
    )
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", flush=True)
        last = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()
        raise RuntimeError(f"sparsify {words[0]} ended with {done.returncode}: {' '.join(last[-4:])}")
    return done.stdout
