"""Exact assignment in C++: an auction on candidate lists, finished and certified in float64 (csrc/assignment/)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...support import machine


def can_run(tensor: Tensor | None = None) -> str | None:
    """Runs wherever the extension is built (on the CPU: other tensors are copied)."""
    return machine.why_no_extension()


def assign(scores: Tensor, maximize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Best permutation of each matrix of scores [B, d, d]: int64 [B, d], its objective and gap, float64 [B].

    NaN stands for both where a matrix holds NaN or Inf (it is seen while solving, at no extra pass).
    float32 and float64 are read in place, transposed views too; other dtypes are converted to float32. Matrices of a
    batch are shared among torch's threads.
    """
    scores = scores.detach().cpu()
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    transposed = scores.stride(-1) != 1 and scores.stride(-2) == 1
    if transposed:
        scores = scores.mT
    elif scores.stride(-1) != 1:
        scores = scores.contiguous()
    batch, d, _ = scores.shape
    permutation = torch.empty((batch, d), dtype=torch.int64)
    objective, gap = (torch.empty(batch, dtype=torch.float64) for _ in range(2))
    extension = machine.extension()
    solve = extension.assignment_f32 if scores.dtype == torch.float32 else extension.assignment_f64
    solve(
        scores.data_ptr(),
        batch,
        d,
        scores.stride(0),
        scores.stride(1),
        transposed,
        not maximize,
        machine.native_isa(),
        torch.get_num_threads(),
        permutation.data_ptr(),
        objective.data_ptr(),
        gap.data_ptr(),
    )
    return permutation, objective, gap
