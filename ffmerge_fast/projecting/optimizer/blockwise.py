"""Block-wise dynamic 8-bit numbers for optimiser moments (Dettmers et al., 8-bit Optimizers, 2022, section 2).

256 values share one float32 scale, their largest magnitude. Each is stored as the nearest of 256 codes between -1 and
1 (or 0 and 1): seven decades down to 1e-7, of which every higher one has twice as many codes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256
_DECADES = 7


def scale_count(numel: int) -> int:
    """Scales of a tensor: one per block, the last of which may be shorter."""
    return -(-numel // BLOCK)


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest codes of a flat tensor.

    Args:
        x: [n], floating point, finite.
        signed: False for values that are not negative. None of them that is above 0 becomes 0.

    Returns:
        (codes uint8 [n], scales float32 [ceil(n / 256)]).
    """
    blocks = _blocks(x)
    scales = blocks.abs().amax(1).float()
    # Normalised, as bfloat16: its 65,536 values index a table, ten times as fast as a search among the codes.
    patterns = (blocks / _divisors(scales, x.dtype)).to(torch.bfloat16).view(torch.int16)
    index = patterns.to(torch.int32).bitwise_and_(0xFFFF).view(-1)[: len(x)]
    return _nearest(signed, x.device).index_select(0, index), scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `quantize` stored, [n]."""
    values = _values(signed, codes.device).to(dtype).index_select(0, codes.to(torch.int32))
    whole = len(values) // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK, None])
    values[whole:].mul_(scales[-1])
    return values


def _blocks(x: Tensor) -> Tensor:
    """[blocks, 256], filled up with zeros."""
    missing = -len(x) % BLOCK
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).view(-1, BLOCK)


def _divisors(scales: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(scales > 0, scales, 1).to(dtype)[:, None]


@functools.cache
def _values(signed: bool, device: torch.device) -> Tensor:
    """float32 [256], ascending: midpoints of the equal parts of each decade, 0 and 1."""
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(_DECADES):
        parts = 2 ** (_DECADES - 1 - decade) * (1 if signed else 2)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0**-decade
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.float().to(device)


@functools.cache
def _nearest(signed: bool, device: torch.device) -> Tensor:
    """uint8 [65536]: the code of every bfloat16 by its bits."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16).double()
    values = _values(signed, torch.device("cpu")).double()
    codes = torch.bucketize(x, (values[1:] + values[:-1]) / 2)
    if not signed:
        codes = torch.where(x > 0, codes.clamp(min=1), 0)
    table = torch.zeros(2**16, dtype=torch.uint8)
    table[bits.int().bitwise_and(0xFFFF).long()] = codes.to(torch.uint8)
    return table.to(device)
