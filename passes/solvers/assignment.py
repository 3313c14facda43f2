"""Who goes where: a one-to-one assignment of n things to n places that is close to the best one.

The auction of Bertsekas (Annals of Operations Research 14, 1988) in Jacobi form: every thing without a place bids for
the one it would gain most by, as much as it would lose by its second best, and the highest bid has it. Prices only
rise; with bids raised by ε the result is within n·ε of the best, and ε goes down in steps, each of which begins at the
prices of the one before.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ε of each step, of the mean spread of a row's benefits.
_STEPS = (0.125, 0.025, 0.005, 0.001)
# Rounds of one auction for each thing, and some for few: numbers so far apart that ε is lost among them would take any.
_ROUNDS, _FEW = 4, 1000


def assign(benefit: Tensor) -> Tensor:
    """The place of each thing: [n], a permutation, for ``benefit`` [things, places]."""
    count, place = len(benefit), torch.arange(len(benefit), device=benefit.device)
    # What a thing gains by any place alike says nothing, and would cost digits.
    benefit = benefit - benefit.amin(dim=1, keepdim=True)
    spread = float(benefit.amax(dim=1).mean())
    if count < 2 or spread <= 0:
        return place
    least = 4 * torch.finfo(benefit.dtype).eps * float(benefit.max())
    price = benefit.new_zeros(count)
    for step in _STEPS:
        place = _auction(benefit, price, max(step * spread, least))
    return place


def _auction(benefit: Tensor, price: Tensor, raised: float) -> Tensor:
    """One auction from ``price`` on, which it moves."""
    count = len(benefit)
    owner = torch.full((count,), -1, device=benefit.device)
    place = owner.clone()
    for _ in range(_ROUNDS * count + _FEW):
        free = (place < 0).nonzero()[:, 0]
        if not len(free):
            break
        value, wish = (benefit[free] - price).topk(2, dim=1)
        wish = wish[:, 0]
        bid = price[wish] + value[:, 0] - value[:, 1] + raised
        highest = torch.full_like(price, -torch.inf).scatter_reduce(0, wish, bid, "amax")
        # Of equal bids one wins: that of the last thing.
        wins = bid == highest[wish]
        winner = torch.full_like(owner, -1).scatter_reduce(0, wish[wins], free[wins], "amax")
        sold = (winner >= 0).nonzero()[:, 0]
        outbid = owner[sold]
        place[outbid[outbid >= 0]] = -1
        owner[sold] = winner[sold]
        place[winner[sold]] = sold
        price[sold] = highest[sold]
    # Whoever is left takes what is left.
    place[place < 0] = (owner < 0).nonzero()[:, 0]
    return place
