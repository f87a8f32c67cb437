"""Ridge least-squares solutions for a student's matrices, norms and tied heads, from the moments of their inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..calibration.least_squares import Regression, ridge_factor
from ..models.projections import matrix
from ..support.distributed import broadcast_
from ..support.errors import FFMergeError
from .axes import MODEL, Axis
from .norms import Gain
from .selection import Selection
from .stages import Linears

_ROWS = 1024  # of a matrix that are solved at a time


class Fits:
    """Sets the student's parameters, in place.

    Args:
        teacher, student: of the same class.
        linears: their matrices along the stream.
        selection: what the student keeps.
        basis: Q [d', d], float64, on the student's device.
        ridge: μ = ridge · mean diagonal of the inputs' moments.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        linears: Linears,
        selection: Selection,
        basis: Tensor,
        ridge: float,
    ):
        self._teacher, self._student, self._linears = teacher, student, linears
        self._selection, self._basis, self._ridge = selection, basis, ridge
        self.narrower = basis.shape[0] < basis.shape[1]
        self.missed: dict[str, tuple[float, float]] = {}  # of writers: share of the target's square, before and after

    def readers(self, paths: Sequence[str], moments: Regression) -> None:
        """Matrices with the same input: min ‖W z' + b − (W_t z + b_t)‖², of the rows that are kept.

        Args:
            moments: of the student's inputs z' and the teacher's z.
        """
        solvers: dict[bool, _Solver] = {}
        for path in paths:
            module, original = self._student.get_submodule(path), self._teacher.get_submodule(path)
            centred = module.bias is not None
            if centred not in solvers:
                solvers[centred] = _Solver(moments, centred, self._ridge, path)
            solver, weight, theirs = solvers[centred], matrix(module), self._rows(path, matrix(original))
            found = [
                solver.solve(own.double(), solver.cross @ rows.to(own.device, torch.float64).T)
                for own, rows in zip(weight.split(_ROWS), theirs.split(_ROWS), strict=True)
            ]
            set_(path, weight, torch.cat(found))
            if centred:
                wanted = theirs.to(weight.device, torch.float64) @ moments.mean("t")
                wanted += self._rows(path, original.bias.detach()).to(wanted)
                set_(path, module.bias.detach(), wanted - weight.double() @ moments.mean("x"))
            same_on_all_ranks(module)

    def writer(self, path: str, moments: Regression) -> None:
        """A matrix that adds to the stream: min ‖W z' + b − t‖², `moments` of z' and t."""
        module = self._student.get_submodule(path)
        centred, weight = module.bias is not None, matrix(module)
        solver = _Solver(moments, centred, self._ridge, path)
        before = solver.missed(weight.double())
        set_(path, weight, solver.solve(weight.double(), solver.cross))
        self.missed[path] = before, solver.missed(weight.double())
        if centred:
            set_(path, module.bias.detach(), moments.mean("t") - weight.double() @ moments.mean("x"))
        same_on_all_ranks(module)

    def norm(self, path: str, moments: Regression) -> None:
        """Gain and bias of a norm of the stream, each feature for itself: `moments` of its output and its target."""
        gain = Gain(self._student.get_submodule(path))
        if not self.narrower or not gain.known:
            return
        centred = gain.bias is not None
        squares, products = moments.gram(centred).diagonal(), moments.cross(centred).diagonal()
        shift = self._ridge * squares.mean()
        factor = (products + shift) / (squares + shift)
        bias = moments.mean("t") - factor * (moments.mean("x") - gain.bias) if centred else None
        gain.set_(gain.value * factor, bias)
        same_on_all_ranks(gain.norm)

    def gain_before(self, head: str, norm: str, moments: Regression) -> None:
        """The gain of a norm before a head that is tied to the embeddings: min ‖E' diag(r) z' − E z‖² over r [d'].

        Args:
            moments: of the head's inputs, the student's z' and the teacher's z.
        """
        gain = Gain(self._student.get_submodule(norm))
        if not gain.known:
            return
        theirs, own = (m.get_submodule(head).weight.detach() for m in (self._teacher, self._student))
        among, across = (
            sum(a.double().T @ b.double() for a, b in zip(own.split(_ROWS), of.to(own).split(_ROWS), strict=True))
            for of in (own, theirs)
        )
        gram, wanted = among * moments.gram(False), (across * moments.cross(False)).sum(1)
        shift = self._ridge * gram.diagonal().mean()
        descent = wanted - gram.sum(1)
        factor = ridge_factor(gram, shift, f"reconstruct: {norm}", moments.tokens)
        r = 1 + torch.cholesky_solve(descent[:, None], factor)[:, 0]
        gain.set_(gain.value * r, None if gain.bias is None else gain.bias * r)
        same_on_all_ranks(gain.norm)

    def absorb_gain(self, paths: Sequence[str], norm: str | None) -> None:
        """Let the norm before matrices have gain one and no bias; they take both over, and give what they gave."""
        gain = Gain(self._student.get_submodule(norm)) if norm else None
        if not self.narrower or gain is None or not gain.known:
            return
        for module in map(self._student.get_submodule, paths):
            weight = matrix(module)
            if gain.bias is not None and module.bias is not None:
                module.bias.add_((weight.double() @ gain.bias).to(module.bias))
            weight.copy_(weight.double() * gain.value)
        gain.set_(torch.ones_like(gain.value), None if gain.bias is None else torch.zeros_like(gain.bias))

    def _rows(self, path: str, x: Tensor) -> Tensor:
        """What the student keeps of the rows of a teacher's matrix or bias."""
        axis = self._linears.axes[path][0]
        x = x.double() if axis is not None and axis.role == MODEL else x
        return kept_features(axis, self._selection, self._basis, x.movedim(0, -1)).movedim(-1, 0)


def kept_features(axis: Axis | None, selection: Selection, basis: Tensor, y: Tensor) -> Tensor:
    """What a student keeps of features y [.., n] along an axis of the base: Q y of the stream, else a selection."""
    if axis is None:
        return y
    if axis.role == MODEL:
        return y @ basis.to(y).T
    return y.index_select(-1, selection.choice(axis).index.to(y.device))


class _Solver:
    """The ridge problem of the matrices that have the same input.

    Attributes:
        cross: E z' tᵀ, [n, m].
    """

    def __init__(self, moments: Regression, centred: bool, ridge: float, path: str):
        self._gram, self.cross = moments.gram(centred), moments.cross(centred)
        self._total = moments.square("t", centred)
        self._shift = ridge * self._gram.diagonal().mean()
        self._factor = ridge_factor(self._gram.clone(), self._shift, f"reconstruct: {path}", moments.tokens)

    def solve(self, start: Tensor, cross: Tensor) -> Tensor:
        """W [out, n] for the start W₀ [out, n] and E z' Tᵀ [n, out]."""
        return start + torch.cholesky_solve(cross - self._gram @ start.T, self._factor).T

    def missed(self, weight: Tensor) -> float:
        """Share of the targets' square that W [m, n] misses, where t is the target itself."""
        left = self._total - (weight * (2 * self.cross.T - weight @ self._gram)).sum()
        return (left / self._total.clamp(min=torch.finfo(torch.float64).tiny)).item()


def set_(path: str, tensor: Tensor, value: Tensor) -> None:
    """Take over a solution, rounded once.

    Raises:
        FFMergeError: it is beyond the tensor's dtype.
    """
    value = value.to(tensor.dtype)
    if not value.isfinite().all():
        raise FFMergeError(
            f"reconstruct: the solution of {path} goes beyond {tensor.dtype}; load the model in float32 or bfloat16 "
            "(--dtype), or raise ridge="
        )
    tensor.copy_(value)


def same_on_all_ranks(module: nn.Module) -> None:
    """Rank 0's values: solutions may be rounded differently elsewhere."""
    broadcast_([p.detach() for p in (module.weight, getattr(module, "bias", None)) if p is not None])
