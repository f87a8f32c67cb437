"""Projected weights in plain PyTorch: the specification of the `projection` op."""

from __future__ import annotations

import torch
from torch import Tensor


def can_run(tensor: Tensor | None = None) -> str | None:
    """Runs everywhere."""
    return None


def input_first(weight: Tensor, p_out: Tensor, p_in: Tensor) -> bool:
    """Whether P_out (W P_in) costs no more than (P_out W) P_in."""
    (r_out, o), (i, r_in) = p_out.shape, p_in.shape
    return o * r_in * (i + r_out) <= r_out * i * (o + r_in)


def project(
    weight: Tensor,  # [o, i]
    p_out: Tensor | None,  # [r_out, o]
    p_in: Tensor | None,  # [i, r_in]
    residual: Tensor | None,  # [r_out, r_in]
) -> tuple[Tensor, Tensor]:
    """W_C = P_out W P_in + R in the dtype of W, and the inner product for backward (empty with one projection only).

    The products are computed in the dtype of W, R is added in at least float32 and the sum rounded once.
    """
    left, right = (None if p is None else p.to(weight.dtype) for p in (p_out, p_in))
    inner = weight.new_empty(0)
    if left is None:
        projected = weight @ right
    elif right is None:
        projected = left @ weight
    elif input_first(weight, left, right):
        inner = weight @ right
        projected = left @ inner
    else:
        inner = left @ weight
        projected = inner @ right
    if residual is not None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        projected = (projected.to(wide) + residual.to(wide)).to(weight.dtype)
    return projected, inner


def project_backward(
    grad: Tensor,  # [r_out, r_in]
    weight: Tensor,
    p_out: Tensor | None,
    p_in: Tensor | None,
    inner: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of P_out and P_in in their own dtypes (empty for one that is absent); never one of W."""
    grad = grad.to(weight.dtype)
    left, right = (None if p is None else p.to(weight.dtype) for p in (p_out, p_in))
    if left is None:
        d_out, d_in = None, weight.T @ grad
    elif right is None:
        d_out, d_in = grad @ weight.T, None
    elif input_first(weight, left, right):  # inner = W P_in
        d_out, d_in = grad @ inner.T, weight.T @ (left.T @ grad)
    else:  # inner = P_out W
        d_out, d_in = (grad @ right.T) @ weight.T, inner.T @ grad
    pairs = ((d_out, p_out), (d_in, p_in))
    return tuple(weight.new_empty(0) if p is None else d.to(p.dtype) for d, p in pairs)
