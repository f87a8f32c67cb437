"""The ring of a sketch: which row and sign a token has."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_STEP = -7046029254386353131  # 0x9e3779b97f4a7c15, the golden ratio's fraction in 64 bits
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685  # of SplitMix64 (Steele et al. 2014), as int64


@lru_cache(maxsize=8)  # all layers of a batch ask for the same
def signs(position: int, count: int, device: torch.device) -> Tensor:
    """The signs, +1 or -1 in float32, of the tokens at `position`, `position + 1`, ... [count]: a hash's parity."""
    x = torch.arange(position, position + count, device=device) * _STEP  # int64 wraps around
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return (1 - 2 * (_shifted(x, 31) & 1)).float()


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits without sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def add_rows_(rows: Tensor, first: int, values: Tensor) -> None:
    """Add `values` [T, ...] to rows `first`, `first + 1`, ... of a ring [m, ...], in order."""
    start = 0
    while start < len(values):
        part = values[start : start + len(rows) - first]
        rows[first : first + len(part)] += part
        start, first = start + len(part), 0
