"""One projected matrix: W_C = P_out · W · P_in + R with P = S + Δ, and its chain rule.

S is a selection, so its products are gathers: at the start, where Δ and R are zero, W_C is exactly the kept slice of
W; and a bfloat16 product rounds only what was learned. The products with Δ are the `projection` op's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.projection.op import project_weight, project_weight_backward
from .selection import Choice


@dataclass(frozen=True, eq=False)
class Projection:
    """P = S + Δ as it acts on rows: [r, n] for W's rows, the transpose of P_in for its columns.

    Attributes:
        owner: name of the parameter in whose state Δ is kept; several matrices may share one.
        entry: name of Δ there.
        choice: S.
    """

    owner: str
    entry: str
    choice: Choice

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of Δ: [blocks, kept, width of a base block]; blocks never mix."""
        return (*self.choice.inner.shape, self.choice.width)

    @property
    def numel(self) -> int:
        blocks, kept, width = self.shape
        return blocks * kept * width

    def kept(self, x: Tensor) -> Tensor:
        """S x: [n, m] -> [r, m]."""
        return x.index_select(0, self.choice.index.to(x.device))

    def learned(self, delta: Tensor, x: Tensor) -> Tensor:
        """Δ x in the dtype of x: [n, m] -> [r, m]."""
        if self.choice.width == len(x):
            return project_weight(x, delta[0])
        return torch.bmm(delta.to(x.dtype), self._blocks(x)).flatten(0, 1)

    def transposed(self, delta: Tensor, y: Tensor, rows: int) -> Tensor:
        """(S + Δ)ᵀ y: [r, m] -> [rows, m]."""
        x = y.new_zeros(rows, y.shape[1])
        if self.choice.width == rows:
            x.copy_(project_weight(y, delta[0].T))
        else:
            back = torch.bmm(delta.to(y.dtype).mT, y.view(len(delta), -1, y.shape[1]))
            x.view(-1, self.choice.width, y.shape[1]).index_add_(0, self.choice.block.to(y.device), back)
        return x.index_add_(0, self.choice.index.to(y.device), y)

    def gradient(self, delta: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        """Of Δ, where `grad` [r, m] is that of (S + Δ) x."""
        if self.choice.width == len(x):
            return project_weight_backward(grad, x, p_out=delta[0])[0][None]
        return torch.bmm(grad.to(x.dtype).view(len(delta), -1, x.shape[1]), self._blocks(x).mT).to(delta.dtype)

    def _blocks(self, x: Tensor) -> Tensor:
        """The base blocks that are kept: [n, m] -> [B, width, m]."""
        return x.reshape(-1, self.choice.width, x.shape[1]).index_select(0, self.choice.block.to(x.device))


@dataclass(frozen=True, eq=False)
class ProjectedMatrix:
    """One parameter of the student whose value is a projection of a frozen one.

    Attributes:
        name: of the parameter, in student and base.
        parameter: the student's: W_C, as stored.
        weight: the base's: W, as stored; it may lie on another device.
        as_matrix: view of such a tensor as [out, in].
        rows, columns: projections of the two axes; None leaves one as it is. At least one is there.
    """

    name: str
    parameter: Tensor
    weight: Tensor
    as_matrix: Callable[[Tensor], Tensor]
    rows: Projection | None
    columns: Projection | None

    @property
    def projections(self) -> list[Projection]:
        return [p for p in (self.rows, self.columns) if p is not None]

    def base(self) -> Tensor:
        """W [out, in] on the parameter's device."""
        return self.as_matrix(self.weight).to(self.parameter.device, non_blocking=True)

    def project_(self, deltas: dict[Projection, Tensor], residual: Tensor | None) -> Tensor | None:
        """Set the parameter to W_C: products in the dtype of W, their sum in at least float32, rounded once.

        Returns the inner product (W · P_in or P_out · W, whichever is cheaper) for `gradients`, None with one P only.
        """
        projected, inner = _forward(self.base(), self.rows, self.columns, deltas, residual)
        self.as_matrix(self.parameter.detach()).copy_(projected)
        return inner

    def gradients(
        self, deltas: dict[Projection, Tensor], grad: Tensor, inner: Tensor | None = None
    ) -> list[tuple[Projection, Tensor]]:
        """The gradient of each projection's Δ from that of W_C; the residual's is `grad` itself.

        `inner` is what `project_` returned for the same deltas; without it, it is computed again.
        """
        return _backward(self.base(), self.rows, self.columns, deltas, grad, inner)


def _rows_first(weight: Tensor, rows: Projection, columns: Projection) -> bool:
    """Whether (P_out W) P_in costs less than P_out (W P_in)."""
    out, in_ = weight.shape
    rows_first = rows.numel * in_ + columns.numel * len(rows.choice)
    columns_first = columns.numel * out + rows.numel * len(columns.choice)
    return rows_first < columns_first


def _forward(weight, rows, columns, deltas, residual) -> tuple[Tensor, Tensor | None]:
    if rows is None or (columns is not None and _rows_first(weight, rows, columns)):
        turned = None if residual is None else residual.T
        projected, inner = _forward(weight.T, columns, rows, deltas, turned)
        return projected.T, inner
    kept, parts = weight, [residual]
    inner = None
    if columns is not None:
        kept = columns.kept(weight.T).T
        change = columns.learned(deltas[columns], weight.T).T
        inner = kept + change  # W P_in
        parts.append(rows.kept(change))
    parts.append(rows.learned(deltas[rows], weight if inner is None else inner))
    total = rows.kept(kept).to(torch.promote_types(weight.dtype, torch.float32))
    for part in parts:
        total = total if part is None else total + part
    return total, inner


def _backward(weight, rows, columns, deltas, grad, inner) -> list[tuple[Projection, Tensor]]:
    if rows is None or (columns is not None and _rows_first(weight, rows, columns)):
        return _backward(weight.T, columns, rows, deltas, grad.T, inner)
    if columns is None:
        return [(rows, rows.gradient(deltas[rows], grad, weight))]
    if inner is None:
        inner = (columns.kept(weight.T) + columns.learned(deltas[columns], weight.T)).T
    of_inner = rows.transposed(deltas[rows], grad.to(weight.dtype), len(weight))
    return [
        (rows, rows.gradient(deltas[rows], grad, inner)),
        (columns, columns.gradient(deltas[columns], of_inner.T, weight.T)),
    ]
