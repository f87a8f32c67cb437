"""Ridge least squares on the moments of the correlation op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import CorrelationState
from ..support.distributed import world_size
from ..support.errors import FFMergeError
from .blocks import at_least_float32


class Regression:
    """Second moments of inputs x [tokens, n] and targets t [tokens, m] of a linear map, of the tokens of all ranks.

    Args:
        n, m: widths.
        like: tensor of whose device the sums are; float64 features are summed in float64.
    """

    def __init__(self, n: int, m: int, like: Tensor):
        compute = "fp64" if like.dtype == torch.float64 else "auto"
        self._state = CorrelationState({"x": n, "t": m}, [("x", "x"), ("x", "t")], like.device, compute)

    def push(self, x: Tensor, t: Tensor, mask: Tensor | None, what: str) -> None:
        """Add the tokens of one batch.

        Raises:
            FFMergeError: features that are not finite (`what` says of which matrix).
        """
        for key, value in (("x", x), ("t", t)):
            self._state.push(key, at_least_float32(value).flatten(0, -2).to(self._state.device), mask)
        try:
            self._state.end_batch()
        except FFMergeError as error:
            raise FFMergeError(f"{what}: {error}") from error

    def all_reduce_(self) -> None:
        if world_size() > 1:
            self._state.all_reduce_()

    @property
    def tokens(self) -> int:
        return self._state.count("x")

    def mean(self, key: str) -> Tensor:
        """Of "x" or "t", float64."""
        return self._state.mean(key)

    def square(self, key: str, centred: bool) -> Tensor:
        """E ‖·‖² of "x" or "t", about the mean or not; float64 scalar."""
        total = self._state.variance(key).sum()
        return total if centred else total + self.mean(key).square().sum()

    def gram(self, centred: bool) -> Tensor:
        """E xᵀx [n, n], about the mean or not, float64."""
        return self._moment("x", centred)

    def cross(self, centred: bool) -> Tensor:
        """E xᵀt [n, m]."""
        return self._moment("t", centred)

    def _moment(self, other: str, centred: bool) -> Tensor:
        moment = self._state.covariance("x", other).double()
        return moment if centred else moment.addr_(self.mean("x"), self.mean(other))


def eliminated(gram: Tensor, cross: Tensor, keep: int, ridge: float, what: str, rows: int, rounds: int = 10) -> Tensor:
    """Indices, ascending, of the `keep` inputs of a regression that do best without the others.

    Backward elimination by optimal brain surgeon (Hassibi & Stork 1992): leaving out input j costs
    ‖(G⁻¹C)_j‖² / (G⁻¹)_jj. In each of the rounds the same share of those that are left goes.

    Args:
        gram: G [n, n]; cross: C [n, m]; both float64, left as they are.
        ridge: share of G's mean diagonal that is added to it.
        what, rows: for the error, as of `ridge_factor`.
    """
    left = torch.arange(len(gram), device=gram.device)
    shift = ridge * gram.diagonal().mean()
    for i in range(1, rounds + 1):
        inverse = torch.cholesky_inverse(ridge_factor(gram[left][:, left], shift, what, rows))
        saliency = (inverse @ cross[left]).square().sum(1) / inverse.diagonal()
        size = round(len(gram) * (keep / len(gram)) ** (i / rounds))
        left = left[saliency.topk(size).indices.sort().values]
    return left


def ridge_factor(gram: Tensor, shift: Tensor | float, what: str, rows: int) -> Tensor:
    """Cholesky factor of gram + shift · I; overwrites gram.

    Raises:
        FFMergeError: that is singular (`what` says of which matrix).
    """
    noise = torch.finfo(torch.float32).eps * gram.diagonal().mean()  # what the float32 sums cannot tell from 0
    gram.diagonal().add_(shift)
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(gram, out=(gram, failed))  # in its own memory: the largest there is here
    if failed or not factor.diagonal().square().min() > noise:
        raise FFMergeError(
            f"{what}: the normal equations are singular ({len(gram)} features, {rows} rows): raise ridge= (1e-2 is "
            "usual) or give more calibration data"
        )
    return factor
