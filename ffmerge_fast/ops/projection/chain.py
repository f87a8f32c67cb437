"""Projections of both axes: W_C = P_out · W · P_in + R and its chain rule, for many matrices of one shape at a time.

Each P acts on rows (P_in on those of Wᵀ). Whichever is cheaper goes first, and its product, `inner`, is what the chain
rule needs of the forward pass: three products more. W never gets a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common import backends
from . import registered as op
from .reference import wide


@dataclass(frozen=True)
class Side:
    """P = S + Δ of one axis as it acts on rows.

    Attributes:
        delta: Δ [B, r, n].
        index: S: the kept row of each of the B·r rows, int64, each in the block of its own; None: S = 0.
    """

    delta: Tensor
    index: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.delta.shape[0] * self.delta.shape[1]


@dataclass(frozen=True)
class Problem:
    """One matrix: W [B·n of rows, B·n of columns] and its projections, of which one may be absent."""

    weight: Tensor
    rows: Side | None
    columns: Side | None

    @property
    def shape(self) -> tuple[int, int]:
        """Of W_C."""
        sides = zip((self.rows, self.columns), self.weight.shape, strict=True)
        return tuple(whole if side is None else side.rows for side, whole in sides)

    def turned(self) -> Problem:
        return Problem(self.weight.T, self.columns, self.rows)


def rows_first(problem: Problem) -> bool:
    """Whether (P_out W) P_in takes fewer multiply-adds than P_out (W P_in)."""
    if problem.rows is None or problem.columns is None:
        return problem.columns is None
    out, in_ = problem.weight.shape
    rows, columns = problem.rows, problem.columns
    ours = rows.delta.numel() * in_ + columns.delta.numel() * rows.rows
    return ours < columns.delta.numel() * out + rows.delta.numel() * columns.rows


def project_(problems: Sequence[Problem], outs: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    """outs = W_C, summed in at least float32 and rounded once; `residuals` is empty or has one R each.

    Returns the inner product of each problem for `gradients`, nothing where there is one P only.
    """
    if not rows_first(problems[0]):
        turned = [[t.T for t in tensors] for tensors in (outs, residuals)]
        problems = [p.turned() for p in problems]
        return _project_(problems, *turned)
    return _project_(problems, list(outs), list(residuals))


def _project_(problems: Sequence[Problem], outs: list[Tensor], residuals: list[Tensor]) -> list[Tensor]:
    first, second = ([getattr(p, name) for p in problems] for name in ("rows", "columns"))
    weights = _weights(problems)
    if second[0] is None:
        op.project_rows_(outs, weights, *_split(first, weights), residuals)
        return []
    like = problems[0].weight
    shape = (first[0].rows, like.shape[1])
    inner = [torch.empty(shape, dtype=wide(like.dtype), device=like.device) for _ in problems]
    op.project_rows_(inner, weights, *_split(first, weights), [])
    operands = [i.to(weights[0].dtype) for i in inner]
    deltas, indices, kept = _split(second, [i.T for i in inner])
    op.project_rows_([o.T for o in outs], [o.T for o in operands], deltas, indices, kept, [r.T for r in residuals])
    return operands


def gradients(
    problems: Sequence[Problem], grads: Sequence[Tensor], inner: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the Δ of rows and of columns, in their dtypes, from `grads`, those of W_C; [] without that P.

    `inner` is what `project_` returned for the same deltas; without it, it is computed again.
    """
    if rows_first(problems[0]):
        return _gradients(problems, list(grads), inner)
    columns, rows = _gradients([p.turned() for p in problems], [g.T for g in grads], inner)
    return rows, columns


def _gradients(problems, grads, inner) -> tuple[list[Tensor], list[Tensor]]:
    first, second = ([getattr(p, name) for p in problems] for name in ("rows", "columns"))
    weights = _weights(problems)
    like = weights[0]
    grads = [g.to(like.dtype) for g in grads]
    if second[0] is None:
        return _gradient(first, grads, weights), []
    shape = (first[0].rows, like.shape[1])
    turned = [g.T for g in grads]
    deltas, indices, _ = _split(second, [])
    of_inner = [like.new_empty(shape) for _ in problems]
    op.project_rows_adjoint_([o.T for o in of_inner], turned, deltas, indices)
    of_first = _gradient(first, of_inner, weights)
    del of_inner  # the second gradient is the larger one
    if not inner:
        inner = [like.new_empty(shape) for _ in problems]
        op.project_rows_(inner, weights, *_split(first, weights), [])
    return of_first, _gradient(second, turned, [i.to(like.dtype).T for i in inner])


def _gradient(sides: Sequence[Side], ys: list[Tensor], xs: list[Tensor]) -> list[Tensor]:
    found = [torch.empty_like(side.delta) for side in sides]
    op.project_rows_gradient_(found, ys, xs)
    return found


def _weights(problems: Sequence[Problem]) -> list[Tensor]:
    """W of each problem in the dtype it is multiplied in."""
    weight = problems[0].weight
    dtype = backends.select("projection", weight).operand_dtype(weight.dtype)
    return [p.weight.to(dtype) for p in problems]


def _split(sides: Sequence[Side], kept: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(Δ, S, what S selects from)."""
    selecting = sides[0].index is not None
    return [s.delta for s in sides], [s.index for s in sides] if selecting else [], kept if selecting else []
