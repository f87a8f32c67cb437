"""Projections on CPUs: C++ selects, adds R and scatters; products are torch's, straight into the results.

Products are MKL's in float32, whatever the dtype of W, except on AMX (see README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...support import env, machine
from . import reference

_HUGE = 2**22  # bytes from which a result is worth large pages


def can_run(tensor: Tensor | None = None) -> str | None:
    """Runs on CPU tensors wherever the extension is built."""
    if tensor is not None and tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}"
    return machine.why_no_extension()


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where the CPU multiplies it in tiles (oneDNN, through torch), else float32 or better."""
    if dtype == torch.bfloat16 and machine.cpu_isa() in ("amx", env.AMX_EMULATED):
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
    """As the reference; where operands are bfloat16, the product with Δ is rounded to that."""
    if not _in_float32(xs[0], deltas[0]):
        return _project_rows_by_torch_(outs, xs, deltas, indices, kept, residuals)
    for i, (out, x, delta) in enumerate(zip(outs, xs, deltas, strict=True)):
        total = out if _is_float32(out) else torch.empty(out.shape)
        residual = residuals[i].float() if residuals else None
        if indices:
            _select_(total, kept[i].float(), indices[i], residual)
        elif residuals:
            total.copy_(residual)
        _multiply_(_blocks(total, len(delta)), delta, _blocks(x, len(delta)), bool(indices or residuals))
        if total is not out:
            out.copy_(total)


def project_rows_adjoint_(outs: list[Tensor], ys: list[Tensor], deltas: list[Tensor], indices: list[Tensor]) -> None:
    """As the reference; where operands are bfloat16, the product with Δ is rounded to that."""
    if not _in_float32(ys[0], deltas[0]):
        return _project_rows_adjoint_by_torch_(outs, ys, deltas, indices)
    for i, (out, y, delta) in enumerate(zip(outs, ys, deltas, strict=True)):
        total = out if _is_float32(out) else torch.empty(out.shape)
        y = y.float()
        _multiply_(_blocks(total, len(delta)), delta.mT, _blocks(y, len(delta)))
        if indices:
            _scatter_(total, y, indices[i])
        if total is not out:
            out.copy_(total)


def project_rows_gradient_(outs: list[Tensor], ys: list[Tensor], xs: list[Tensor]) -> None:
    """As the reference; where operands are bfloat16, rounded to that."""
    in_float32 = _in_float32(xs[0], outs[0])
    for out, y, x in zip(outs, ys, xs, strict=True):
        y, x = _blocks(y, len(out)), _blocks(x, len(out)).mT
        if in_float32 and out.dtype == torch.float32:
            _multiply_(out, y, x)
        else:
            out.copy_(_multiply_(out.new_empty(out.shape, dtype=torch.float32), y, x) if in_float32 else _product(y, x))


def _in_float32(operand: Tensor, delta: Tensor) -> bool:
    """Whether products are float32: not in float64, and not where AMX multiplies one large bfloat16 block."""
    return operand.dtype != torch.float64 and (len(delta) > 1 or operand_dtype(operand.dtype) == torch.float32)


def _project_rows_by_torch_(outs, xs, deltas, indices, kept, residuals) -> None:
    for i, (out, x, delta) in enumerate(zip(outs, xs, deltas, strict=True)):
        total = _product(delta, _blocks(x, len(delta))).flatten(0, 1).to(reference.wide(x.dtype))
        if indices:
            total += kept[i].index_select(0, indices[i])
        if residuals:
            total += residuals[i]
        out.copy_(total)


def _project_rows_adjoint_by_torch_(outs, ys, deltas, indices) -> None:
    for i, (out, y, delta) in enumerate(zip(outs, ys, deltas, strict=True)):
        total = _product(delta.mT, _blocks(y, len(delta))).flatten(0, 1).to(reference.wide(y.dtype))
        if indices:
            total.index_add_(0, indices[i], y.to(total.dtype))
        out.copy_(total)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b of [B, ., .] in the dtype of b; a row-major, as oneDNN likes it."""
    a = a.to(b.dtype)
    return torch.bmm(a, b) if len(a) > 1 else (a[0].contiguous() @ b[0])[None]


def _multiply_(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> Tensor:
    """out (+)= a · b of [B, ., .], in float32."""
    a, b = a.float(), b.float()
    _expect_writes(out)
    if len(out) > 1:
        return out.baddbmm_(a, b, beta=float(add))
    out[0].addmm_(a[0], b[0], beta=float(add))
    return out


def _expect_writes(out: Tensor) -> None:
    """Large pages for a large result: fresh memory otherwise faults at every 4 KiB."""
    if out.nbytes >= _HUGE:
        machine.extension().prefer_huge_pages(out.data_ptr(), out.nbytes)


def _blocks(x: Tensor, blocks: int) -> Tensor:
    return x.unflatten(0, (blocks, -1))


def _is_float32(x: Tensor) -> bool:
    """Whether C++ can write it: float32 with one axis contiguous."""
    return x.dtype == torch.float32 and 1 in x.stride()


def _select_(out: Tensor, x: Tensor, index: Tensor, residual: Tensor | None) -> None:
    """out = x[index] (+ residual)."""
    _expect_writes(out)
    rows, columns = index.data_ptr(), 0
    if out.stride(1) != 1:  # the C++ loops run along rows
        out, x, rows, columns = out.T, x.T, columns, rows
        residual = None if residual is None else residual.T
    added = (0, (0, 0)) if residual is None else (residual.data_ptr(), residual.stride())
    machine.extension().projection_select_f32(
        *(tuple(out.shape), tuple(x.shape), x.data_ptr(), x.stride(), rows, columns),
        *(*added, out.data_ptr(), out.stride(0), _threads()),
    )


def _scatter_(out: Tensor, y: Tensor, index: Tensor) -> None:
    """out[index] += y."""
    rows, columns = index.data_ptr(), 0
    if out.stride(1) != 1:
        out, y, rows, columns = out.T, y.T, columns, rows
    machine.extension().projection_scatter_f32(
        *(tuple(y.shape), tuple(out.shape), y.data_ptr(), y.stride(), rows, columns),
        *(out.data_ptr(), out.stride(0), _threads()),
    )


def _threads() -> int:
    return torch.get_num_threads()
