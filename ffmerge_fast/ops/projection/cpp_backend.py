"""Projections on CPUs: C++ selects, adds R and scatters; products are torch's, straight into the results.

Products are MKL's in float32, whatever the dtype of W, except on AMX (see README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _backend, _env
from . import reference


def can_run(tensor: Tensor | None = None) -> str | None:
    """Runs on CPU tensors wherever the extension is built."""
    if tensor is not None and tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}"
    return _backend.why_no_extension()


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where the CPU multiplies it in tiles (oneDNN, through torch), else float32 or better."""
    if dtype == torch.bfloat16 and _backend.cpu_isa() in ("amx", _env.AMX_EMULATED):
        return dtype
    return reference.operand_dtype(dtype)


def project_rows_(
    outs: list[Tensor],
    xs: list[Tensor],
    deltas: list[Tensor],
    indices: list[Tensor],
    kept: list[Tensor],
    residuals: list[Tensor],
) -> None:
    """As the reference."""
    if xs[0].dtype != torch.float32:
        return _project_rows_rounded_(outs, xs, deltas, indices, kept, residuals)
    for i, (out, x, delta) in enumerate(zip(outs, xs, deltas, strict=True)):
        total = out if _is_float32(out) else torch.empty(out.shape)
        residual = residuals[i].float() if residuals else None
        if indices:
            _select_(total, kept[i].float(), indices[i], residual)
        elif residuals:
            total.copy_(residual)
        _multiply_(_blocks(total, len(delta)), delta.float(), _blocks(x, len(delta)), bool(indices or residuals))
        if total is not out:
            out.copy_(total)


def project_rows_adjoint_(outs: list[Tensor], ys: list[Tensor], deltas: list[Tensor], indices: list[Tensor]) -> None:
    """As the reference."""
    if ys[0].dtype != torch.float32 or not _is_float32(outs[0]):
        return _project_rows_adjoint_rounded_(outs, ys, deltas, indices)
    for i, (out, y, delta) in enumerate(zip(outs, ys, deltas, strict=True)):
        _multiply_(_blocks(out, len(delta)), delta.float().mT, _blocks(y, len(delta)))
        if indices:
            _scatter_(out, y, indices[i])


def project_rows_gradient_(outs: list[Tensor], ys: list[Tensor], xs: list[Tensor]) -> None:
    """As the reference."""
    for out, y, x in zip(outs, ys, xs, strict=True):
        y, x = _blocks(y, len(out)), _blocks(x, len(out)).mT
        if y.dtype == out.dtype:
            _multiply_(out, y, x)
        else:
            out.copy_(_product(y, x))


def _project_rows_rounded_(outs, xs, deltas, indices, kept, residuals) -> None:
    """With bfloat16 operands for AMX; float64 goes the same way. Only the product with Δ is rounded."""
    for i, (out, x, delta) in enumerate(zip(outs, xs, deltas, strict=True)):
        total = _product(delta.to(x.dtype), _blocks(x, len(delta))).flatten(0, 1)
        if indices:
            total = total + kept[i].index_select(0, indices[i])
        if residuals:
            total = total + residuals[i]
        out.copy_(total)


def _project_rows_adjoint_rounded_(outs, ys, deltas, indices) -> None:
    for i, (out, y, delta) in enumerate(zip(outs, ys, deltas, strict=True)):
        total = _product(delta.to(y.dtype).mT, _blocks(y, len(delta))).flatten(0, 1)
        if indices:
            total = total.to(reference.wide(y.dtype)).index_add_(0, indices[i], y.to(reference.wide(y.dtype)))
        out.copy_(total)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b of [B, ., .]; a row-major, which is several times as fast on AMX."""
    return torch.bmm(a.contiguous(), b) if len(a) > 1 else (a[0].contiguous() @ b[0])[None]


def _multiply_(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out (+)= a · b of float32 [B, ., .]."""
    if len(out) > 1:
        out.baddbmm_(a, b, beta=float(add))
    else:
        out[0].addmm_(a[0], b[0], beta=float(add))


def _blocks(x: Tensor, blocks: int) -> Tensor:
    return x.unflatten(0, (blocks, -1))


def _is_float32(x: Tensor) -> bool:
    """Whether C++ can write it: float32 with one axis contiguous."""
    return x.dtype == torch.float32 and 1 in x.stride()


def _select_(out: Tensor, x: Tensor, index: Tensor, residual: Tensor | None) -> None:
    """out = x[index] (+ residual)."""
    rows, columns = index.data_ptr(), 0
    if out.stride(1) != 1:  # the C++ loops run along rows
        out, x, rows, columns = out.T, x.T, columns, rows
        residual = None if residual is None else residual.T
    added = (0, (0, 0)) if residual is None else (residual.data_ptr(), residual.stride())
    _backend.extension().projection_select_f32(
        tuple(out.shape), x.data_ptr(), x.stride(), rows, columns, *added, out.data_ptr(), out.stride(0), _threads()
    )


def _scatter_(out: Tensor, y: Tensor, index: Tensor) -> None:
    """out[index] += y."""
    rows, columns = index.data_ptr(), 0
    if out.stride(1) != 1:
        out, y, rows, columns = out.T, y.T, columns, rows
    _backend.extension().projection_scatter_f32(
        tuple(y.shape), y.data_ptr(), y.stride(), rows, columns, out.data_ptr(), out.stride(0), _threads()
    )


def _threads() -> int:
    return torch.get_num_threads()
