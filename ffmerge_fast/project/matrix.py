"""One projected matrix: W_C = P_out · W · P_in + R with P = S + Δ, and its chain rule.

S is a selection, so its products are gathers: at the start, where Δ and R are zero, W_C is exactly the kept slice of
W; and a bfloat16 product rounds only what was learned. The arithmetic is the `projection` op's (ops/projection/chain).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..ops.projection.chain import Problem, Side, gradients, project_
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

    def side(self, delta: Tensor) -> Side:
        """As the op takes it: of the base's blocks only those that are kept, in their order."""
        return Side(delta, self._index.to(delta.device, non_blocking=True))

    def kept_blocks(self, x: Tensor) -> Tensor:
        """[blocks of the base · width, m] -> [kept blocks · width, m]; no copy where all are kept."""
        block, width = self.choice.block, self.choice.width
        if len(block) * width == len(x):
            return x
        return x.unflatten(0, (-1, width)).index_select(0, block.to(x.device)).flatten(0, 1)

    @cached_property
    def _index(self) -> Tensor:
        blocks = torch.arange(len(self.choice.block))[:, None]
        return (blocks * self.choice.width + self.choice.inner).reshape(-1)


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

    def problem(self, deltas: dict[Projection, Tensor]) -> Problem:
        """As the op takes it, W on the parameter's device."""
        weight = self.as_matrix(self.weight).to(self.parameter.device, non_blocking=True)
        if self.rows is not None:
            weight = self.rows.kept_blocks(weight)
        if self.columns is not None:
            weight = self.columns.kept_blocks(weight.T).T
        return Problem(weight, *(None if p is None else p.side(deltas[p]) for p in (self.rows, self.columns)))

    def project_(self, deltas: dict[Projection, Tensor], residual: Tensor | None) -> Tensor | None:
        """Set the parameter to W_C: summed in at least float32, rounded once.

        Returns the inner product (W · P_in or P_out · W, whichever is cheaper) for `gradients`, None with one P only.
        """
        out = self.as_matrix(self.parameter.detach())
        inner = project_([self.problem(deltas)], [out], [] if residual is None else [residual])
        return inner[0] if inner else None

    def gradients(
        self, deltas: dict[Projection, Tensor], grad: Tensor, inner: Tensor | None = None
    ) -> list[tuple[Projection, Tensor]]:
        """The gradient of each projection's Δ from that of W_C; the residual's is `grad` itself.

        `inner` is what `project_` returned for the same deltas; without it, it is computed again.
        """
        rows, columns = gradients([self.problem(deltas)], [grad], [] if inner is None else [inner])
        return list(zip(self.projections, rows + columns, strict=True))
