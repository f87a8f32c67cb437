"""Which parameters of a student are projections of the base model's, by which P; the rest is trained as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..models.projections import is_conv1d
from ..models.sublayers import get
from ..support.errors import FFMergeError
from .axes import MODEL, Axis, ModelAxes
from .matrices import ProjectedMatrix, Projection
from .selection import Selection


@dataclass
class SortedParameters:
    """The trained parameters of a student.

    Attributes:
        matrices: {name: projected matrix}; weights first, then the biases that follow a weight's rows.
        plain: {name: parameter} that are no projections: norms, vectors, and what keeps its shape.
        stream: the projections of the residual stream, in order (as keys).
    """

    matrices: dict[str, ProjectedMatrix] = field(default_factory=dict)
    plain: dict[str, nn.Parameter] = field(default_factory=dict)
    stream: dict[Projection, None] = field(default_factory=dict)


def sorted_parameters(
    model: nn.Module, student: nn.Module, layout: ModelAxes, selection: Selection, share: str | None
) -> SortedParameters:
    """Sort the student's parameters.

    Args:
        share: projections in common, one of `SHARES`, see `project`.

    Raises:
        FFMergeError: a tensor of three or more axes that follows d_model on two of them.
    """
    return _Sorter(model, student, layout, selection, share).sort()


class _Sorter:
    def __init__(
        self, model: nn.Module, student: nn.Module, layout: ModelAxes, selection: Selection, share: str | None
    ):
        self.student, self.layout, self.selection, self.share = student, layout, selection, share
        self.base = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
        self.shared: dict[str, Projection] = {}
        self.found = SortedParameters()

    def sort(self) -> SortedParameters:
        matrices = self.found.matrices
        trained = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            if parameter.ndim >= 2:
                self._add_matrix(name, parameter)
        for name, parameter in trained.items():  # after all weights
            weight = matrices.get(f"{name.removesuffix('bias')}weight")
            if name.endswith("bias") and weight is not None and weight.rows is not None:
                self._add(name, parameter, _as_column, weight.rows, None)
        self.found.plain |= {name: p for name, p in trained.items() if name not in matrices}
        return self.found

    def _add_matrix(self, name: str, parameter: nn.Parameter) -> None:
        axes = [None if a is None or self._whole(a) else a for a in self.layout.axes[name]]
        as_matrix, rows, columns = self._oriented(name, axes)
        if parameter.ndim > 2 and (any(axes[1:-1]) or (rows is not None and columns is not None)):
            raise FFMergeError(
                f"project: {name} follows d_model on two axes of {parameter.ndim}: not supported; give d_ff= alone"
            )
        alone = as_matrix(parameter.detach()).shape[0] == 1  # a class token is a vector
        if (rows is not None or columns is not None) and not alone:
            p_out, p_in = self._projection(name, rows, "out"), self._projection(name, columns, "in")
            self._add(name, parameter, as_matrix, p_out, p_in)

    def _oriented(
        self, name: str, axes: list[Axis | None]
    ) -> tuple[Callable[[Tensor], Tensor], Axis | None, Axis | None]:
        """How a tensor with these axes is read as a matrix, and the axes of its rows and columns."""
        module = get(self.student, name.rpartition(".")[0])
        rows, columns = axes[0], axes[-1]
        if module is not None and is_conv1d(module):
            return _turned, axes[1], axes[0]
        if len(axes) > 2 and columns is None:
            return _rows_of, rows, columns
        if len(axes) > 2 and rows is None:
            return _columns_of, rows, columns
        return _as_it_is, rows, columns

    def _add(self, name, parameter, as_matrix, rows, columns) -> None:
        self.found.matrices[name] = ProjectedMatrix(name, parameter, self.base[name], as_matrix, rows, columns)

    def _whole(self, axis: Axis) -> bool:
        """Whether nothing is left out along an axis."""
        choice = self.selection.choice(axis)
        return len(choice) == len(axis.parts) * self._base_width(axis)

    def _base_width(self, axis: Axis) -> int:
        return self.layout.width(axis, self.layout.d_model, self.layout.stacks()) // len(axis.parts)

    def _projection(self, name: str, axis: Axis | None, side: str) -> Projection | None:
        if axis is None:
            return None
        attention = self.layout.readers.get(name.removesuffix(".weight"))
        key, entry = f"{name} {side}", f"p_{side}"
        if axis.role == MODEL and self.share == "residual_stream":
            key = entry = "p_model"
        elif axis.role == MODEL and self.share == "qkv" and side == "in" and attention is not None:
            key = f"{attention} in"
        if key not in self.shared:
            self.shared[key] = Projection(name, entry, self.selection.choice(axis))
            if axis.role == MODEL:
                self.found.stream[self.shared[key]] = None
        return self.shared[key]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _turned(tensor: Tensor) -> Tensor:
    return tensor.T


def _as_column(tensor: Tensor) -> Tensor:
    return tensor[:, None]


def _rows_of(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)


def _columns_of(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2)
