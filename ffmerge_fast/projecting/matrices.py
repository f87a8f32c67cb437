"""Projected matrices: W_C = P_out · W · P_in + R with P = S + Δ, and their chain rule.

S is a selection, so its products are gathers: at the start, where Δ and R are zero, W_C is exactly the kept slice of
W; and a bfloat16 product rounds only what was learned. The arithmetic is the `projection` op's (ops/projection/chain).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..ops.projection import chain
from ..ops.projection.chain import Problem, Side
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

    @property
    def form(self) -> Hashable:
        """Equal for matrices that the op takes at once."""
        sides = [None if p is None else p.shape for p in (self.rows, self.columns)]
        return (*sides, self.as_matrix, self.weight.shape, self.weight.dtype, self.parameter.dtype)

    def problem(self, deltas: Mapping[Projection, Tensor]) -> Problem:
        """As the op takes it, W on the parameter's device."""
        weight = self.as_matrix(self.weight).to(self.parameter.device, non_blocking=True)
        if self.rows is not None:
            weight = self.rows.kept_blocks(weight)
        if self.columns is not None:
            weight = self.columns.kept_blocks(weight.T).T
        return Problem(weight, *(None if p is None else p.side(deltas[p]) for p in (self.rows, self.columns)))


def alike(matrices: Iterable[ProjectedMatrix], most: int) -> Iterator[list[ProjectedMatrix]]:
    """Matrices of one form together, as long as their Δ have at most `most` values; larger ones alone."""
    by_form: dict[Hashable, list[ProjectedMatrix]] = {}
    for matrix in matrices:
        group = by_form.setdefault(matrix.form, [])
        group.append(matrix)
        if (len(group) + 1) * sum(p.numel for p in matrix.projections) > most:
            yield by_form.pop(matrix.form)
    yield from by_form.values()


def project_(
    matrices: Sequence[ProjectedMatrix], deltas: Mapping[Projection, Tensor], residuals: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Set the parameters of matrices of one form to W_C: summed in at least float32, rounded once.

    Args:
        residuals: R of each as [out, in], or nothing.

    Returns the inner products (W · P_in or P_out · W, whichever is cheaper) for `gradients`, nothing with one P only.
    """
    outs = [m.as_matrix(m.parameter.detach()) for m in matrices]
    return chain.project_([m.problem(deltas) for m in matrices], outs, residuals)


def gradients(
    matrices: Sequence[ProjectedMatrix],
    deltas: Mapping[Projection, Tensor],
    grads: Sequence[Tensor],
    inner: Sequence[Tensor] = (),
) -> list[tuple[Projection, Tensor]]:
    """What each matrix adds to the gradients of its Δ, from those of W_C; a residual's is that of W_C itself.

    Args:
        grads: of W_C, as [out, in].
        inner: what `project_` returned for the same deltas; without it, it is computed again.
    """
    rows, columns = chain.gradients([m.problem(deltas) for m in matrices], grads, inner)
    sides = [m.rows for m in matrices if rows], [m.columns for m in matrices if columns]
    return list(zip(itertools.chain(*sides), rows + columns, strict=True))


@dataclass(frozen=True, eq=False)
class Unit:
    """Matrices that share projections (usually a weight and its bias), or a plain parameter.

    Attributes:
        matrices: projected ones.
        plain: {name: parameter} trained as they are.
    """

    matrices: list[ProjectedMatrix]
    plain: dict[str, Tensor] = field(default_factory=dict)

    @property
    def projections(self) -> list[Projection]:
        """Each once."""
        return list(dict.fromkeys(p for m in self.matrices for p in m.projections))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{name: parameter of the student}."""
        return {m.name: m.parameter for m in self.matrices} | self.plain

    def trained(self, residual: bool) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(parameter name, entry of its state, shape) of everything that is trained."""
        yield from ((p.owner, p.entry, p.shape) for p in self.projections)
        if residual:
            yield from ((m.name, "residual", tuple(m.parameter.shape)) for m in self.matrices)
        yield from ((name, "master", tuple(p.shape)) for name, p in self.plain.items())

    def numel(self, residual: bool) -> int:
        """How many values are trained."""
        return sum(math.prod(shape) for _, _, shape in self.trained(residual))

    def on(self, parameters: Mapping[str, Tensor] | None = None, weights: Mapping[str, Tensor] | None = None) -> Unit:
        """The same unit with other tensors for some of its parameters or base weights."""
        parameters, weights = parameters or {}, weights or {}
        return Unit(
            [
                replace(m, parameter=parameters.get(m.name, m.parameter), weight=weights.get(m.name, m.weight))
                for m in self.matrices
            ],
            {name: parameters.get(name, p) for name, p in self.plain.items()},
        )

    def keep_weights_(self, held: Mapping[str, Tensor]) -> None:
        """Take over base weights by name, and let go of the others (they become "meta")."""
        self.matrices[:] = [replace(m, weight=held.get(m.name, m.weight.to("meta"))) for m in self.matrices]


def grouped(matrices: list[ProjectedMatrix]) -> list[Unit]:
    """Units of the matrices that share a projection, directly or through others."""
    units: list[list[ProjectedMatrix]] = []
    for matrix in matrices:
        touching = [u for u in units if any(p in m.projections for m in u for p in matrix.projections)]
        units = [u for u in units if u not in touching] + [[m for u in touching for m in u] + [matrix]]
    return [Unit(members) for members in units]
