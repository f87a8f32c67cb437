"""Projections P = S + Δ in plain PyTorch: the specification of the `projection` op.

Every backend has these functions. All take lists: one entry per problem, all problems of one shape. A projection acts
on rows in B equal blocks that never mix: Δ is [B, r, n], x is [B·n, m], y is [B·r, m]; most often B = 1. S is given by
the kept row of each row of y (`index`), or is absent. Matrices may have any strides.
"""

from __future__ import annotations

import torch
from torch import Tensor


def can_run(tensor: Tensor | None = None) -> str | None:
    """Runs everywhere."""
    return None


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """What W, Δ and gradients are converted to before they are multiplied, for W in `dtype`."""
    return wide(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What products are summed in: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def project_rows_(
    outs: list[Tensor],  # y [B·r, m]
    xs: list[Tensor],  # [B·n, m], in an operand dtype
    deltas: list[Tensor],  # Δ [B, r, n]
    indices: list[Tensor],  # S: int64 [B·r], or no entries
    kept: list[Tensor],  # x for S, perhaps in a wider dtype than for Δ; no entries without S
    residuals: list[Tensor],  # R [B·r, m], or no entries
) -> None:
    """y = S x + Δ x + R, summed in float32 or better and rounded once."""
    for i, (out, x, delta) in enumerate(zip(outs, xs, deltas, strict=True)):
        dtype = wide(x.dtype)
        total = torch.bmm(delta.to(dtype), _blocks(x.to(dtype), len(delta))).flatten(0, 1)
        if indices:
            total += kept[i].index_select(0, indices[i])
        if residuals:
            total += residuals[i]
        out.copy_(total)


def project_rows_adjoint_(
    outs: list[Tensor],  # x̄ [B·n, m]
    ys: list[Tensor],  # ȳ [B·r, m], in an operand dtype
    deltas: list[Tensor],
    indices: list[Tensor],
) -> None:
    """x̄ = (S + Δ)ᵀ ȳ."""
    for i, (out, y, delta) in enumerate(zip(outs, ys, deltas, strict=True)):
        dtype = wide(y.dtype)
        total = torch.bmm(delta.to(dtype).mT, _blocks(y.to(dtype), len(delta))).flatten(0, 1)
        if indices:
            total.index_add_(0, indices[i], y.to(dtype))
        out.copy_(total)


def project_rows_gradient_(
    outs: list[Tensor],  # of Δ [B, r, n]
    ys: list[Tensor],  # ȳ [B·r, m], in an operand dtype
    xs: list[Tensor],  # [B·n, m], in the same
) -> None:
    """out = ȳ xᵀ, block by block: the gradient of Δ where ȳ is that of (S + Δ) x."""
    for out, y, x in zip(outs, ys, xs, strict=True):
        dtype = wide(x.dtype)
        out.copy_(torch.bmm(_blocks(y.to(dtype), len(out)), _blocks(x.to(dtype), len(out)).mT))


def _blocks(x: Tensor, blocks: int) -> Tensor:
    """[B·n, m] -> [B, n, m]."""
    return x.unflatten(0, (blocks, -1))
