"""Every method as its paper writes it: float64, one column or one row at a time, no shared code with the product."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.method.statistics import InputStatistics


def problem(kind: str, rows: int = 24, columns: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and an input [tokens, columns] of a kind that breaks careless code."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(512, columns, generator=generator, dtype=torch.float64) @ mixing / columns**0.5
    if kind == "ill-conditioned":
        turn = torch.linalg.qr(mixing).Q
        inputs = inputs @ (turn * torch.logspace(0, -5, columns, dtype=torch.float64)) @ turn.T
    elif kind == "rank-deficient":
        inputs = inputs[:, : columns // 4] @ mixing[: columns // 4]
    elif kind == "dead":
        inputs[:, ::7] = 0
    elif kind == "outliers":
        inputs[:, 3] *= 100
    return weight, inputs


PATTERNS = ("2:4", "4:8", "1:4", "50%", "70%")
KINDS = ("random", "ill-conditioned", "rank-deficient", "dead", "outliers")


def statistics(inputs: Tensor, dense: Tensor | None = None, sequences: int = 8, **more: Tensor) -> InputStatistics:
    values = {
        "squared_norm": inputs.square().sum(dim=0) / sequences,
        "absolute_sum": inputs.abs().sum(dim=0) / sequences,
        "absolute_max": inputs.abs().amax(dim=0),
        "gram": (inputs.T @ inputs / sequences).float(),
    }
    if dense is not None:
        values["cross_gram"] = (dense.T @ inputs / sequences).float()
    return InputStatistics(values | more, len(inputs), sequences)


def damped(inputs: Tensor, percdamp: float = 0.01, sequences: int = 8) -> tuple[Tensor, Tensor]:
    """H and the dead inputs: algorithms.md, section 5.1."""
    gram = inputs.T @ inputs / sequences
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    return gram + percdamp * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64), dead


def objective(weight: Tensor, goal: Tensor, h: Tensor) -> float:
    apart = weight.double() - goal.double()
    return float(((apart @ h) * apart).sum())


def close(weight: Tensor, reference: Tensor, tolerance: float = 1e-4) -> bool:
    return float((weight.double() - reference).norm() / reference.norm()) <= tolerance


def agree(ours: Tensor, mask: Tensor, reference: Tensor, pruned: Tensor, goal: Tensor, h: Tensor) -> None:
    """The bar: masks ≥ 99.9%, weights within 1e-4 where masks agree, objective never 0.1% worse."""
    assert float((mask == pruned).double().mean()) >= 0.999
    same = (mask == pruned).all(dim=1)
    assert close(ours[same], reference[same])
    assert objective(ours, goal, h) <= 1.001 * objective(reference, goal, h) + 1e-12


Scores = Callable[[Tensor, int, Tensor], Tensor]


def column_by_column(
    weight: Tensor,
    h: Tensor,
    dead: Tensor,
    pattern: str,
    scores: Scores,
    mask: Tensor | None = None,
    blocksize: int = 128,
    settle: Callable[[Tensor], Tensor] = lambda column: column,
) -> tuple[Tensor, Tensor]:
    """The official SparseGPT loop; ``scores(columns, first, U_jj)`` ranks, ``mask`` given means update only, ``settle``
    rounds what a column keeps."""
    w = weight.double().clone()
    w[:, dead] = 0
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    pruned = torch.zeros_like(w, dtype=torch.bool)
    kept, m = map(int, pattern.split(":")) if ":" in pattern else (0, 0)
    for j in range(w.shape[1]):
        if mask is not None:
            pruned[:, j] = mask[:, j]
        elif m and j % m == 0:
            part = scores(w[:, j : j + m], j, upper.diagonal()[j : j + m])
            order = part.sort(dim=1, stable=True).indices[:, : m - kept]
            pruned[:, j : j + m].scatter_(1, order, True)
        elif not m and j % blocksize == 0:
            part = scores(w[:, j : j + blocksize], j, upper.diagonal()[j : j + blocksize])
            count = int(part.numel() * float(pattern.rstrip("%")) / 100)
            order = part.flatten().sort(stable=True).indices[:count]
            block = torch.zeros(part.numel(), dtype=torch.bool)
            block[order] = True
            pruned[:, j : j + blocksize] = block.view(part.shape)
        value = settle(w[:, j].masked_fill(pruned[:, j], 0))
        error = (w[:, j] - value) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        w[:, j] = value
    w[pruned] = 0
    return w, pruned


def obs_scores(columns: Tensor, first: int, diagonal: Tensor) -> Tensor:
    return columns.square() / diagonal.square()


def row_by_row(goal: Tensor, h: Tensor, mask: Tensor) -> Tensor:
    """The optimum of each row on its kept columns, from the normal equations."""
    result = torch.zeros_like(goal, dtype=torch.float64)
    for row, (target, gone) in enumerate(zip(goal.double(), mask, strict=True)):
        keep = (~gone).nonzero().flatten()
        result[row, keep] = torch.linalg.solve(h[keep][:, keep], (target @ h)[keep])
    return result


def block_by_block(goal: Tensor, h: Tensor, mask: Tensor, blocksize: int) -> Tensor:
    """Section 8.2, "block": joint removal within a block, columns to its left frozen."""
    w = goal.double().clone()
    for start in range(0, w.shape[1], blocksize):
        inverse = torch.linalg.inv(h[start:, start:])
        for row in range(len(w)):
            gone = mask[row, start : start + blocksize].nonzero().flatten()
            if len(gone):
                d = -w[row, start + gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone]
                w[row, start:] += d
    return w.masked_fill(mask, 0)


def best_removal(weight: Tensor, h: Tensor, kept: int, m: int) -> Tensor:
    """Mask M: for each group the candidates P with the least ½ w_P (G_PP)⁻¹ w_Pᵀ, G = H⁻¹."""
    inverse = torch.linalg.inv(h)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], m):
            losses = {}
            for chosen in itertools.combinations(range(start, start + m), m - kept):
                p = list(chosen)
                w = weight[row, p].double()
                losses[chosen] = float(w @ torch.linalg.inv(inverse[p][:, p]) @ w)
            mask[row, list(min(losses, key=losses.__getitem__))] = True
    return mask


def twin_goal(
    weight: Tensor, pruned: Tensor, dense: Tensor, blend: float, damping: float, sequences: int = 8
) -> Tensor:
    """W* of ‖P Wᵀ − (a·X + (1−a)·P) W₀ᵀ‖² + λ‖W − W₀‖², by least squares on stacked equations."""
    size = weight.shape[1]
    left = torch.cat([pruned / sequences**0.5, damping**0.5 * torch.eye(size, dtype=torch.float64)])
    target = (blend * dense + (1 - blend) * pruned) @ weight.double().T / sequences**0.5
    right = torch.cat([target, damping**0.5 * weight.double().T])
    return torch.linalg.lstsq(left, right).solution.T
