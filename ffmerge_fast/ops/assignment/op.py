"""The `assignment` op: checks, registration and the result with its certificate."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ... import _backend
from ..._errors import FFMergeError
from ..._library import define_op


def _assign(scores: Tensor, maximize: bool) -> tuple[Tensor, Tensor]:
    permutation, objective = _backend.select("assignment", scores).assign(scores, maximize)
    return permutation.to(scores.device), objective


def _assign_fake(scores, maximize):
    batch, d, _ = scores.shape
    objective = torch.empty(batch, dtype=torch.float64, device="cpu")
    return scores.new_empty((batch, d), dtype=torch.int64), objective


_assign_op = define_op("_assign(Tensor scores, bool maximize) -> (Tensor, Tensor)", _assign, _assign_fake)


@dataclass(eq=False)
class Assignment:
    """The best one-to-one assignment of rows to columns, for one matrix [d, d] or a batch [B, d, d].

    Attributes:
        permutation: int64 [d] or [B, d], on the device of the scores; row i is assigned column permutation[i].
        objective: Σ_i scores[i, permutation[i]] in float64, a float or a list of B floats.
    """

    permutation: Tensor
    objective: float | list[float]
    _scores: Tensor = field(repr=False)
    _maximize: bool = field(repr=False)

    @cached_property
    def gap(self) -> float | list[float]:
        """Certificate of optimality: no assignment is better by more than gap · max(|objective|, largest |score|).

        A duality gap, rounding apart 0. Computed on first access, O(d²) a round; until then the scores are kept alive.
        """
        scores, self._scores = self._scores, None
        shape = (-1, *scores.shape[-2:]) if scores.ndim == 2 else scores.shape
        permutation = self.permutation.reshape(-1, scores.shape[-1]) if scores.ndim == 2 else self.permutation
        gaps = _backend.select("assignment", scores).gap(scores.reshape(shape), permutation, self._maximize).tolist()
        return gaps[0] if scores.ndim == 2 else gaps


def assign(scores: Tensor, maximize: bool = True) -> Assignment:
    """Exact linear assignment (paper A, eq. 2): the permutation with the largest Σ_i scores[i, permutation[i]].

    Deterministic; among equal optima scipy's choice stands (the identity if all scores are equal).

    Args:
        scores: [d, d] or a batch [B, d, d]; float32, float64, bfloat16 or float16; not modified.
        maximize: False looks for the smallest sum.

    Raises:
        FFMergeError: not a floating-point tensor, not square, or NaN or Inf inside.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise FFMergeError(f"scores: got {got}, want a floating-point tensor")
    if scores.ndim not in (2, 3) or scores.shape[-1] != scores.shape[-2]:
        raise FFMergeError(f"scores: got shape {list(scores.shape)}, want [d, d] or [B, d, d]")
    scores = scores.detach()
    if not scores.isfinite().all():
        raise FFMergeError("scores: hold NaN or Inf; give dead neurons score 0")
    single = scores.ndim == 2
    permutation, objective = _assign_op(scores[None] if single else scores, maximize)
    objectives = objective.tolist()
    if single:
        return Assignment(permutation[0], objectives[0], scores, maximize)
    return Assignment(permutation, objectives, scores, maximize)
