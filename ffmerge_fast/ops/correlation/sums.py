"""The sums of one layer: count, pivot, Σ(x - pivot), Σ(x - pivot)²; mean and variance from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("count", "pivot", "sum", "sumsq")
_EPS = torch.finfo(torch.float32).eps


@dataclass
class LayerSums:
    """Streaming moments of one layer's features around a pivot."""

    count: Tensor  # [] int64
    pivot: Tensor  # [d] the mean of the first batch that has tokens
    sum: Tensor  # [d] float64, Σ (x - pivot)
    sumsq: Tensor  # [d] float64, Σ (x - pivot)²
    tokens: int = 0  # count as of the last end_batch, on the host

    @classmethod
    def empty(cls, width: int, dtype: torch.dtype, device: torch.device) -> LayerSums:
        sums = (torch.zeros(width, dtype=t, device=device) for t in (dtype, torch.float64, torch.float64))
        return cls(torch.zeros((), dtype=torch.int64, device=device), *sums)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.count, self.pivot, self.sum, self.sumsq

    def total(self) -> Tensor:
        """Σ x, in float64."""
        return self.pivot.double() * self.count + self.sum

    def mean(self) -> Tensor:
        return self.total() / self.count

    def variance(self) -> Tensor:
        """1/n; exactly 0 where it is only rounding noise of a constant."""
        mean = self.sum / self.count
        variance = self.sumsq / self.count - mean.square()
        noise = (2 * _EPS * (self.pivot + mean)).square()  # of float32 values around the mean: one unit either way
        return variance.masked_fill(variance <= noise.clamp(min=torch.finfo(torch.float32).tiny), 0)

    def inverse_std(self) -> Tensor:
        """1 / std, 0 where the variance is 0."""
        variance = self.variance()
        return torch.where(variance > 0, variance.rsqrt(), 0)

    def move_pivot_(self, pivot: Tensor) -> Tensor:
        """Express the sums around another pivot; returns old minus new pivot [d] in float64."""
        pivot = pivot.to(self.pivot.dtype)
        shift = self.pivot.double() - pivot.double()
        self.sumsq += shift * (2 * self.sum + self.count * shift)
        self.sum += self.count * shift
        self.pivot.copy_(pivot)
        return shift


def comoments(products: Tensor, a: LayerSums, b: LayerSums) -> Tensor:
    """Products around the means [d_a, d_b], of two layers' pivoted products; a new matrix, count times covariance."""
    mean_a, sum_b = (a.sum / a.count).to(products.dtype), b.sum.to(products.dtype)
    return torch.addr(products, mean_a, sum_b, alpha=-1)
