"""Text that is validated on and would be trained on: found by the tokens themselves, whatever the files are called."""

from __future__ import annotations

import torch
from torch import Tensor

# A run of so many tokens that stands in both is the same text.
RUN = 32
# An odd multiplier for hashes modulo 2^64: Knuth's for linear congruences.
_MULTIPLIER = 6364136223846793005


def apart(ids: Tensor, held_out: Tensor) -> Tensor:
    """Which sequences of ``ids`` share no run of ``RUN`` tokens with the held-out text: bool [sequences].

    A run that the held-out text itself repeats (a system prompt, a licence, padding) is no sign, and does not count.

    Args:
        ids: [sequences, length]. held_out: [windows, length], one behind the other in their text.

    >>> text = torch.arange(200)
    >>> apart(torch.stack([text[20:84], text[100:164]]), text[110:190][None]).tolist()
    [True, False]
    """
    length = min(RUN, ids.shape[1], held_out.numel())
    known, counts = _runs(held_out.reshape(1, -1), length).flatten().unique(return_counts=True)
    return ~torch.isin(_runs(ids, length), known[counts == 1]).any(dim=1)


def _runs(ids: Tensor, length: int) -> Tensor:
    """A number for the ``length`` tokens from each position on: [rows, positions]."""
    whole, places = ids.long(), ids.shape[1] - length + 1
    found = torch.zeros(len(ids), places, dtype=torch.long)
    for offset in range(length):
        found = found * _MULTIPLIER + whole[:, offset : offset + places] + 1
    return found
