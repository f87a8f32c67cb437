"""The `assignment` op: checks, registration and the result with its certificate."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import isnan

import torch
from torch import Tensor

from ...support.errors import FFMergeError
from ...support.tensors import check_memory
from . import reference
from .registered import assign_op

_LARGEST = 1e300  # of a float64 score: sums of larger ones overflow


@dataclass(eq=False)
class Assignment:
    """The best one-to-one assignment of rows to columns, for one matrix [d, d] or a batch [B, d, d].

    Attributes:
        permutation: int64 [d] or [B, d], on the device of the scores; row i is assigned column permutation[i].
        objective: Σ_i scores[i, permutation[i]] in float64, a float or a list of B floats.
    """

    permutation: Tensor
    objective: float | list[float]
    _gap: float | list[float] | None = field(repr=False)  # None: the backend did not find it on its way
    _scores: Tensor | None = field(repr=False)  # kept where the gap is still to be found
    _maximize: bool = field(repr=False)

    @cached_property
    def gap(self) -> float | list[float]:
        """Certificate of optimality: no assignment is better by more than gap · max(|objective|, largest |score|).

        A duality gap in float64, rounding apart 0. The C++ backend finds it while solving; the reference computes it on
        first access, O(d²) a round, and keeps the scores alive until then.
        """
        if self._gap is not None:
            return self._gap
        scores, self._scores = self._scores, None
        single = scores.ndim == 2
        scores, permutation = (scores[None], self.permutation[None]) if single else (scores, self.permutation)
        gaps = reference.gap(scores, permutation, self._maximize).tolist()
        return gaps[0] if single else gaps


def assign(scores: Tensor, maximize: bool = True) -> Assignment:
    """Exact linear assignment (paper A, eq. 2): the permutation with the largest Σ_i scores[i, permutation[i]].

    Deterministic for each backend, whatever the number of threads; which of several equal optima is found depends on
    the backend (the identity if all scores are equal). The matrices of a batch are shared among torch's threads.

    Args:
        scores: [d, d] or a batch [B, d, d]; float32, float64, bfloat16 or float16; not modified.
        maximize: False looks for the smallest sum.

    Raises:
        FFMergeError: not a floating-point tensor, not square, NaN or Inf inside, or float64 scores beyond 1e300.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise FFMergeError(f"scores: got {got}, want a floating-point tensor")
    if scores.ndim not in (2, 3) or scores.shape[-1] != scores.shape[-2]:
        raise FFMergeError(f"scores: got shape {list(scores.shape)}, want [d, d] or [B, d, d]")
    check_memory("scores", scores)
    scores = scores.detach()
    if scores.dtype == torch.float64 and scores.numel() and _LARGEST < scores.abs().max() < torch.inf:
        raise FFMergeError(f"scores: got one of {scores.abs().max():.1e}, wanted at most 1e300: scale them down")
    single = scores.ndim == 2
    permutation, objective, gap = assign_op(scores[None] if single else scores, maximize)
    objectives, gaps = objective.tolist(), gap.tolist()
    if any(map(isnan, objectives)):
        raise FFMergeError("scores: hold NaN or Inf; give dead neurons score 0")
    if any(g < 0 for g in gaps):
        gaps = None
    else:
        scores = None  # certified: nothing left to do with them
    if single:
        return Assignment(permutation[0], objectives[0], gaps and gaps[0], scores, maximize)
    return Assignment(permutation, objectives, gaps, scores, maximize)
