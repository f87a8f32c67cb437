"""What is updated together: matrices that share projections, or one parameter that is trained as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from .matrix import ProjectedMatrix, Projection


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
