"""The `projection` op: checks, registration and autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...support.errors import FFMergeError
from ...support.tensors import check_memory
from ..common.registry import define_op
from .chain import Problem, Side, gradients, project_, rows_first


def _project(weight, p_out, p_in, residual):
    problem = _problem(weight, p_out, p_in)
    projected = weight.new_empty(problem.shape)
    inner = project_([problem], [projected], [] if residual is None else [residual])
    return projected, inner[0].to(weight.dtype) if inner else weight.new_empty(0)


def _project_fake(weight, p_out, p_in, residual):
    problem = _problem(weight, p_out, p_in)
    inner = (0,)
    if p_out is not None and p_in is not None:
        rows, columns = problem.shape
        inner = (rows, weight.shape[1]) if rows_first(problem) else (columns, weight.shape[0])
    return weight.new_empty(problem.shape), weight.new_empty(inner)


def _backward(grad, weight, p_out, p_in, inner):
    rows, columns = gradients([_problem(weight, p_out, p_in)], [grad], [inner] if inner.numel() else [])
    d_out = rows[0][0] if rows else weight.new_empty(0)
    return d_out, columns[0][0].T if columns else weight.new_empty(0)


def _backward_fake(grad, weight, p_out, p_in, inner):
    return tuple(weight.new_empty(0) if p is None else p.new_empty(p.shape) for p in (p_out, p_in))


def _problem(weight, p_out, p_in):
    rows = None if p_out is None else Side(p_out[None])
    return Problem(weight, rows, None if p_in is None else Side(p_in.T[None]))


_project_op = define_op(
    "_project_weight(Tensor weight, Tensor? p_out, Tensor? p_in, Tensor? residual) -> (Tensor, Tensor)",
    _project,
    _project_fake,
)
_backward_op = define_op(
    "_project_weight_backward(Tensor grad, Tensor weight, Tensor? p_out, Tensor? p_in, Tensor inner)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class ProjectWeightFunction(torch.autograd.Function):
    """Autograd around the op; the frozen weight gets no gradient."""

    @staticmethod
    def forward(ctx, weight, p_out, p_in, residual):
        projected, inner = _project_op(weight, p_out, p_in, residual)
        ctx.save_for_backward(weight, p_out, p_in, inner)
        ctx.residual_dtype = None if residual is None else residual.dtype
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        needs = ctx.needs_input_grad
        d_out = d_in = None
        if needs[1] or needs[2]:
            d_out, d_in = _backward_op(grad, *ctx.saved_tensors)
        d_residual = grad.to(ctx.residual_dtype) if needs[3] else None
        return None, d_out if needs[1] else None, d_in if needs[2] else None, d_residual


def project_weight(
    weight: Tensor, p_out: Tensor | None = None, p_in: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Projected weight W_C = P_out · W · P_in + R of projected compression (paper B); either P may be absent.

    The cheaper order of the two products is chosen. P and R may be float32 masters of a bfloat16 W: the products run
    in the dtype of W, and gradients have the dtypes of P and R. W never gets a gradient. Differentiable once.

    Args:
        weight: W [out, in], frozen; the layout of nn.Linear.
        p_out: [r_out, out]. p_in: [in, r_in]. At least one of them.
        residual: R [r_out, r_in].

    Returns:
        [r_out, r_in] in the dtype of `weight`; r_out = out without `p_out`, r_in = in without `p_in`.

    Raises:
        FFMergeError: neither P is given, or a shape, dtype or device does not fit.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise FFMergeError(f"weight: got {weight.dtype} {list(weight.shape)}, want a floating-point matrix [out, in]")
    check_memory("weight", weight)
    if p_out is None and p_in is None:
        raise FFMergeError("p_out, p_in: both are None; give at least one projection")
    out, in_ = weight.shape
    _check("p_out", p_out, weight, (None, out))
    _check("p_in", p_in, weight, (in_, None))
    r_out, r_in = len(weight if p_out is None else p_out), (weight if p_in is None else p_in).shape[1]
    _check("residual", residual, weight, (r_out, r_in))
    return ProjectWeightFunction.apply(weight, p_out, p_in, residual)


def _check(name: str, tensor: Tensor | None, weight: Tensor, shape: tuple[int | None, int | None]) -> None:
    if tensor is None:
        return
    fits = (want in (None, got) for got, want in zip(tensor.shape, shape, strict=False))
    if tensor.ndim != 2 or not all(fits):
        want = [("r" if n is None else n) for n in shape]
        raise FFMergeError(f"{name}: got shape {list(tensor.shape)}, want {want} for weight {list(weight.shape)}")
    if not tensor.is_floating_point() or tensor.device != weight.device:
        got = f"{tensor.dtype} on {tensor.device}"
        raise FFMergeError(f"{name}: got {got}, want a floating-point tensor on {weight.device}")
    check_memory(name, tensor)
