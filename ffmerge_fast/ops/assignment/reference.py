"""Exact assignment by scipy, and a certificate of optimality: the specification of the `assignment` op."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ROWS = 256  # rows per float64 block of the certificate
_TOLERANCE = 1e-13  # of the largest score: prices that rise by less are at rest


def can_run(tensor: Tensor | None = None) -> str | None:
    """Runs everywhere (on the CPU: other tensors are copied)."""
    return None


def assign(scores: Tensor, maximize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Best permutation of each matrix of scores [B, d, d]: int64 [B, d], its objective, float64 [B], and gaps of -1.

    That is, none: scipy finds no prices. `gap` does, on demand. The objective is NaN where a matrix holds NaN or Inf.
    """
    from scipy.optimize import linear_sum_assignment  # half a second, of every process otherwise

    matrices = _numpy(scores)
    batch, d = matrices.shape[:2]
    permutations = np.tile(np.arange(d), (batch, 1))
    objectives = np.full(batch, np.nan)
    for b, matrix in enumerate(matrices):
        if not np.isfinite(matrix).all():
            continue
        rows, permutations[b] = linear_sum_assignment(matrix, maximize=maximize)
        objectives[b] = matrix[rows, permutations[b]].sum(dtype=np.float64)
    objective = torch.from_numpy(objectives)
    return torch.from_numpy(permutations), objective, torch.full_like(objective, -1)


def gap(scores: Tensor, permutation: Tensor, maximize: bool) -> Tensor:
    """How far each permutation [B, d] can be from the optimum of scores [B, d, d] at most, relative, float64 [B].

    Any prices v bound the optimum from above by Σ_j v_j + Σ_i max_j (s_ij - v_j); the bound is tight for the prices
    that make the permutation stable, which Bellman-Ford finds when the permutation is optimal.
    """
    sign = 1.0 if maximize else -1.0
    pairs = zip(_numpy(scores), permutation.cpu().numpy(), strict=True)
    return torch.tensor([_relative_gap(matrix, columns, sign) for matrix, columns in pairs], dtype=torch.float64)


def _relative_gap(matrix: np.ndarray, columns: np.ndarray, sign: float) -> float:
    d = len(matrix)
    largest = max(float(matrix.max()), -float(matrix.min()), 0.0) if d else 0.0
    if largest == 0:
        return 0.0
    own = sign * matrix[np.arange(d), columns].astype(np.float64)
    prices = _prices(matrix, columns, own, sign, _TOLERANCE * largest)
    bound = prices.sum() + sum(
        (sign * matrix[i : i + _ROWS].astype(np.float64) - prices).max(axis=1).sum() for i in range(0, d, _ROWS)
    )
    objective = own.sum()
    return max(bound - objective, 0.0) / max(abs(objective), largest)


def _prices(matrix: np.ndarray, columns: np.ndarray, own: np.ndarray, sign: float, tolerance: float) -> np.ndarray:
    """Raise each price to what other rows would pay, v_j = max_i (s_ij - s_i,π(i) + v_π(i)), until nothing moves."""
    d = len(matrix)
    row_of = np.argsort(columns)
    prices = np.zeros(d)
    active = np.arange(d)  # rows whose own column changed price
    for _ in range(d):
        offers = np.full(d, -np.inf)
        for i in range(0, len(active), _ROWS):
            rows = active[i : i + _ROWS]
            pays = sign * matrix[rows].astype(np.float64) + (prices[columns[rows]] - own[rows])[:, None]
            np.maximum(offers, pays.max(axis=0), out=offers)
        risen = np.flatnonzero(offers > prices + tolerance)
        if not len(risen):
            break
        prices[risen] = offers[risen]
        active = row_of[risen]
    return prices


def _numpy(scores: Tensor) -> np.ndarray:
    scores = scores.detach().cpu()
    return (scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores).numpy()
