"""Streaming second moments in plain PyTorch: the specification of the `correlation` op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.activations import FORWARD
from .packing import RowPacking
from .ring import add_rows_

packing = RowPacking  # how this backend keeps features and products
_ROWS = 256  # rows per float64 block: bounds the temporaries of the column sums


def can_run(tensor: Tensor | None = None) -> str | None:
    """Runs everywhere."""
    return None


def accumulate_layer_(
    x: Tensor,  # [T, d]
    mask: Tensor | None,  # [T] bool
    count: Tensor,  # [] int64
    pivot: Tensor,  # [d] float32 (float64 when compute is "fp64")
    sum_: Tensor,  # [d] float64
    sumsq: Tensor,  # [d] float64
    activation: str | None,
    compute: str,
    set_pivot: bool,
) -> Tensor:
    """Add one layer's tokens to its sums; return the pivoted features [T, d], 0 where masked, for the pairs.

    `compute="bf16"` rounds the pivoted features, and the sums are those of the rounded values, so that variances
    and products agree; "bf16x3" means float32-grade accuracy and is float32 here.
    """
    values = x.to(pivot.dtype)
    if activation is not None:
        values = FORWARD[activation](values)
    tokens = torch.tensor(len(x), device=x.device) if mask is None else mask.sum()
    if mask is not None:  # not a product with 0: padding may hold NaN
        values = values.masked_fill(~mask[:, None], 0)
    if set_pivot:
        mean = _column_sums(values)[0] / tokens.clamp(min=1)
        pivot.copy_(mean if activation else mean.to(x.dtype))  # on the inputs' grid: exact differences and products
    features = values - pivot  # exact where |mean| >> std (Sterbenz)
    if mask is not None:
        features.masked_fill_(~mask[:, None], 0)
    if compute == "bf16":
        features = features.bfloat16()
    count += tokens
    for total, batch in zip((sum_, sumsq), _column_sums(features), strict=True):
        total += batch
    return features


def accumulate_pair_(a: Tensor, b: Tensor, products: Tensor) -> None:
    """products [d_a, d_b] += aᵀ b for the pivoted features a [T, d_a] and b [T, d_b] of two layers."""
    with torch.autocast(products.device.type, enabled=False):
        products.addmm_(a.to(products.dtype).T, b.to(products.dtype))


def accumulate_ring_(
    x: Tensor,  # [T or more, d]
    at: Tensor | None,  # [T] int64, row of x of each token; None: x has T rows, all tokens
    signs: Tensor,  # [T] float32
    pivot: Tensor,  # [d] float32
    rows: Tensor,  # [m, d] float32
    first: int,  # row of token 0
    sum_: Tensor,  # [d] float64
    sumsq: Tensor,  # [d] float64
    activation: str | None,
) -> None:
    """Add each token, activated, pivoted and times its sign, to its row of a ring, and its Σ and Σ² without sign."""
    for start in range(0, len(signs), _ROWS):
        block = x[start : start + _ROWS] if at is None else x[at[start : start + _ROWS]]
        values = block.float() if activation is None else FORWARD[activation](block.float())
        values = values - pivot
        for total, part in zip((sum_, sumsq), _column_sums(values), strict=True):
            total += part
        add_rows_(rows, (first + start) % len(rows), values * signs[start : start + _ROWS, None])


def _column_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ x and Σ x² over the rows, in float64."""
    sums, squares = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(_ROWS):
        rows = rows.double()
        sums += rows.sum(0)
        squares += rows.square().sum(0)
    return sums, squares
