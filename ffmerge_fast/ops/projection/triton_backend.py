"""Projections on GPUs: one kernel multiplies, selects and adds R, for up to eight matrices of one shape in a launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...support import env
from ..common import tuning
from ..common.triton_launch import can_run, launch, multiprocessors, no_tf32
from . import reference

__all__ = ["can_run", "operand_dtype", "project_rows_", "project_rows_adjoint_", "project_rows_gradient_"]

_HALF = (torch.bfloat16, torch.float16)
_WAVES = 8  # tiles per multiprocessor from which cuBLAS is expected to win where nothing is added to a product


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision stays: tensor cores multiply it and add in float32."""
    return dtype


def project_rows_(
    outs: list[Tensor],
    xs: list[Tensor],
    deltas: list[Tensor],
    indices: list[Tensor],
    kept: list[Tensor],
    residuals: list[Tensor],
) -> None:
    """As the reference, with Δ rounded to the dtype of x."""
    if xs[0].dtype not in _HALF:
        with no_tf32():
            return reference.project_rows_(outs, xs, deltas, indices, kept, residuals)
    blocks = len(deltas[0])
    _launch(deltas, _cut(xs, blocks), _cut(outs, blocks), indices, kept, _cut(residuals, blocks))


def project_rows_adjoint_(outs: list[Tensor], ys: list[Tensor], deltas: list[Tensor], indices: list[Tensor]) -> None:
    """As the reference, with Δ rounded to the dtype of y: what is scattered there is selected here."""
    if ys[0].dtype not in _HALF:
        with no_tf32():
            return reference.project_rows_adjoint_(outs, ys, deltas, indices)
    blocks = len(deltas[0])
    inverse = [_inverse(index, len(out)) for index, out in zip(indices, outs, strict=False)]
    _launch([d.mT for d in deltas], _cut(ys, blocks), _cut(outs, blocks), inverse, ys if inverse else [], [])


def project_rows_gradient_(outs: list[Tensor], ys: list[Tensor], xs: list[Tensor]) -> None:
    """As the reference."""
    if xs[0].dtype not in _HALF:
        with no_tf32():
            return reference.project_rows_gradient_(outs, ys, xs)
    blocks = len(outs[0])
    ys, xs = _cut(ys, blocks), [x.mT for x in _cut(xs, blocks)]
    if _cublas_wins(outs[0]):
        for out, y, x in zip(outs, ys, xs, strict=True):
            torch.mm(y[0], x[0], out_dtype=torch.float32, out=out[0])
    else:
        _launch(ys, xs, outs, [], [], [])


def closed_form(shared: int) -> tuning.Config:
    """The largest tile and pipeline that fit into `shared` bytes of one block, for a left side in float32."""
    wide = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8}
    stages = {block: min(4, (shared - 4096) // (6 * block * 64)) for block in (128, 64)}
    return wide | {"num_stages": stages[128]} if stages[128] > 1 else narrow(wide | {"num_stages": stages[64]})


def narrow(config: tuning.Config) -> tuning.Config:
    """The same with tiles of a quarter, where too few would keep a GPU busy."""
    return config | {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}


def _launch(
    a: list[Tensor],  # [B, M, K] each
    b: list[Tensor],  # [B, K, N]
    outs: list[Tensor],  # [B, M, N]
    indices: list[Tensor],  # [B·M], or no entries
    kept: list[Tensor],  # [., N], or no entries
    residuals: list[Tensor],  # [B, M, N], or no entries
) -> None:
    """outs = a · b + kept[indices] + residuals, `GROUP` at a time."""
    from . import triton_kernels as kernels

    columns = [a, b, outs, indices, kept, residuals]
    aligned = all(t.data_ptr() % 16 == 0 for column in columns for t in column) and _alike(columns)
    step = kernels.GROUP if aligned else 1  # the kernel finds a problem's addresses by their distance
    for start in range(0, len(a), step):
        part = [column[start : start + step] for column in columns]
        if len(part[0]) > 1:
            part = [column + column[:1] * (kernels.GROUP - len(column)) if column else [] for column in part]
        _launch_group(kernels._project_rows_kernel, min(step, len(a) - start), *part)


def _launch_group(kernel, count, a, b, outs, indices, kept, residuals) -> None:
    (blocks, m, n), depth, device = outs[0].shape, a[0].shape[2], outs[0].device
    config = tuning.config("projection_rows", device, closed_form)
    tiles = count * blocks * -(-m // config["BLOCK_M"]) * -(-n // config["BLOCK_N"])
    if tiles < multiprocessors(device):
        config = narrow(config)
        tiles = count * blocks * -(-m // config["BLOCK_M"]) * -(-n // config["BLOCK_N"])
    if not tiles:
        return
    strides = [*a[0].stride(), *b[0].stride(), *outs[0].stride()]
    strides += kept[0].stride() if kept else (0, 0)
    strides += residuals[0].stride() if residuals else (0, 0, 0)
    pointers = [tuple(column or outs) for column in (a, b, outs, indices, kept, residuals)]
    launch(
        kernel,
        (tiles,),
        device,
        *(*pointers, blocks, m, n, depth, *strides),
        SELECT=bool(indices),
        RESIDUAL=bool(residuals),
        INTERPRETED=env.triton_interpreter(),
        **config,
    )


def _alike(columns: list[list[Tensor]]) -> bool:
    """Whether strides and dtypes are the same in all problems."""
    return all(t.stride() == c[0].stride() and t.dtype == c[0].dtype for c in columns for t in c)


def _cut(tensors: list[Tensor], blocks: int) -> list[Tensor]:
    """[B·n, m] -> [B, n, m] each."""
    return [t.unflatten(0, (blocks, -1)) for t in tensors]


def _inverse(index: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the position in `index` of each row, -1 where it has none."""
    inverse = torch.full((rows,), -1, dtype=torch.int64, device=index.device)
    return inverse.scatter_(0, index, torch.arange(len(index), device=index.device))


def _cublas_wins(out: Tensor) -> bool:
    """A plain product of one large matrix, where this torch multiplies into float32 (2.8, on GPUs)."""
    if not out.is_cuda or len(out) > 1 or out.dtype != torch.float32 or not hasattr(torch.ops.aten.mm, "dtype_out"):
        return False
    tiles = -(-out.shape[1] // 128) * -(-out.shape[2] // 128)
    return tiles >= _WAVES * multiprocessors(out.device)
