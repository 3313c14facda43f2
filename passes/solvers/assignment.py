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


def assign(benefit: Tensor) -> Tensor:
    """The place of each thing: [n], a permutation, for ``benefit`` [things, places]."""
    count, device = len(benefit), benefit.device
    if count == 1:
        return torch.zeros(1, dtype=torch.long, device=device)
    spread = float((benefit.amax(dim=1) - benefit.amin(dim=1)).mean())
    price = benefit.new_zeros(count)
    place = torch.arange(count, device=device)
    if spread <= 0:
        return place
    for step in _STEPS:
        place = _auction(benefit, price, step * spread)
    return place


def _auction(benefit: Tensor, price: Tensor, raised: float) -> Tensor:
    """One auction from ``price`` on, which it moves."""
    count = len(benefit)
    owner = torch.full((count,), -1, device=benefit.device)
    place = owner.clone()
    while len(free := (place < 0).nonzero()[:, 0]):
        value, wish = (benefit[free] - price).topk(2, dim=1)
        wish = wish[:, 0]
        # At least the next number: a bid that leaves a large price where it is would be made for ever.
        least = torch.nextafter(price[wish], price.new_tensor(torch.inf))
        bid = torch.maximum(price[wish] + value[:, 0] - value[:, 1] + raised, least)
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
    return place
