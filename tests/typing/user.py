"""What a user of the package may write: every public name, under mypy --strict. It is checked and not run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import sparsify


def told(step: sparsify.Progress) -> None:
    share: float | None = step.share
    print(step.phase, step.count, step.what, share)


def everything(net: nn.Module, texts: list[str], ids: Tensor, tokenizer: object) -> None:
    result: sparsify.Compiled = sparsify.compile("MODEL", "twin:2:4+refine", ignore="*.q_proj", calibration=Path("t"))
    sparsify.compile(Path("MODEL"), ["wanda:2:4"], only=["*.mlp.*"], calibration=texts, progress=True)
    sparsify.compile(net, sparsify.parse_pass("wanda:2:4"), calibration=[ids], tokenizer=tokenizer, progress=told)
    kept: float = result.runs[0].kept
    error: float | None = result.runs[0].sites[0].error
    where: Path = result.save("OUT", to="onnx:weights=packed", overwrite=True)
    module: nn.Module = result.model
    weight: Tensor = result.weight("layer.weight")
    said: str = result.summary()
    print(kept, error, where, module, weight, said)
    found: sparsify.Evaluation = sparsify.evaluate(result, texts, windows=8, sequence_length=128, device="cpu")
    sparsify.evaluate(net, ids, tokenizer=tokenizer, memory="1GiB", observe=told)
    perplexity: float = found.perplexity
    tasks: sparsify.Evaluation = sparsify.evaluate("OUT", tasks=["boolq", Path("own.yaml")], num_fewshot=2, limit=9)
    value: float = tasks.score("boolq").value
    print(perplexity, value, [pair.verdict for pair in tasks.differences(tasks)], tasks.scores[0].standard_error)
    loaded: nn.Module = sparsify.load(where, dtype=torch.bfloat16)
    with sparsify.hold_zeros(loaded):
        pass
    within: sparsify.Found = sparsify.search("MODEL", "wanda", budget="perplexity<=1.05", data="text.txt", windows=8)
    print(within.sparsity, within.shares["o_proj"], within.words)
    costs: sparsify.Sensitivity = sparsify.sensitivity(net, "wanda:2:4", data="text.txt", progress=told)
    print(costs.ignore_line, costs.total)
    page: Path = sparsify.report(where, "report.html", overwrite=True)
    apart: sparsify.Difference = sparsify.diff("MODEL", where, only="*.mlp.*")
    print(page, apart.same, apart.verdict, apart.whole.share_b, [group.name for group in apart.kinds])
    library: str = sparsify.onnx_library()
    with sparsify.join() as world:
        shared: sparsify.World = world
        sparsify.compile("model", "wanda:2:4", world=shared)
    print(library)
    callback: sparsify.HoldZeros = sparsify.HoldZeros()
    print(callback)
    own = sparsify.parse_pass("wanda:2:4")
    assert isinstance(own, sparsify.WeightPass)
    pruned: sparsify.Pruned | None = None
    print(sparsify.GraphPrune(own, [ids]), pruned)
    try:
        sparsify.evaluate("MODEL", "python-stdlib")
    except sparsify.SparsifyError as problem:
        print(problem.asked, problem.found, problem.do)
