"""The moments of all layers and pairs, and how those of several states become one (Chan et al. 1979)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...support.distributed import sum_over_ranks
from ...support.errors import FFMergeError

Key = Hashable
Pair = tuple[Key, Key]

_NAMES = ("count", "pivot", "sum", "sumsq")
_EPS = torch.finfo(torch.float32).eps
_SETTLED = 64  # tokens that make a good pivot; one from fewer is refined at the end of the next batches


class PivotMove(NamedTuple):
    """What moving a layer's pivot changed, all [d] in float64."""

    sum_before: Tensor
    shift: Tensor  # old minus new pivot
    sum_after: Tensor


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

    def copy_as(self, other: LayerSums) -> LayerSums:
        """A copy on the device and in the dtypes of `other`."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return LayerSums(*(mine.to(theirs, copy=True) for mine, theirs in pairs), self.tokens)

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

    def move_pivot_(self, pivot: Tensor) -> PivotMove:
        """Express the sums around another pivot."""
        pivot = pivot.to(self.pivot.dtype)
        before, shift = self.sum.clone(), self.pivot.double() - pivot.double()
        self.sumsq += shift * (2 * self.sum + self.count * shift)
        self.sum += self.count * shift
        self.pivot.copy_(pivot)
        return PivotMove(before, shift, self.sum)

    def add_(self, other: LayerSums) -> None:
        """Add sums around the same pivot."""
        for name in ("count", "sum", "sumsq"):
            getattr(self, name).add_(getattr(other, name))
        self.tokens += other.tokens


class Accumulators(Protocol):
    """The products of all pairs. `settle` comes before anything that writes: pivots, merging, loading."""

    def push(self, key: Key, x: Tensor, mask: Tensor | None, sums: LayerSums, seen: Iterable[Key]) -> None:
        """Add one layer's tokens; `seen` are the layers of this batch so far, this one included."""

    def held(self) -> int:
        """Number of layers whose features wait."""

    def discard_open_batch(self) -> None:
        """Forget features that wait: a batch was left incomplete, and partners no longer hold the same tokens."""

    def settle(self) -> None:
        """Form every product that is due."""

    def product(self, pair: Pair) -> Tensor:
        """The products of a pair, [d_a, d_b]; to be read only."""

    def kept(self, pair: Pair) -> Tensor:
        """The same where they are kept, which may be on the host."""

    def replace_(self, pair: Pair, matrix: Tensor) -> None:
        """Set the products of a pair (after `settle`); `matrix` may be what `product` returned, changed in place."""

    def better_pivot(self, key: Key, sums: LayerSums) -> Tensor:
        """The pivot to go on with after a first batch of few tokens."""


@dataclass
class Moments:
    """The sums of layers and the products of pairs, around one pivot a layer."""

    layers: dict[Key, LayerSums]
    pairs: list[Pair]
    accumulators: Accumulators

    def push(self, key: Key, x: Tensor, mask: Tensor | None, seen: Iterable[Key]) -> None:
        """Add one layer's tokens; `seen` are the layers of this batch so far, this one included."""
        self.accumulators.push(key, x, mask, self.layers[key], seen)

    def end_batch(self) -> None:
        """Count the batch's tokens, and refine pivots that rest on few (one device sync).

        Raises:
            FFMergeError: sums are not finite (NaN, Inf or beyond float32), naming the layers.
        """
        layers = self.layers.values()
        worst = [layer.sumsq.max() for layer in layers]  # NaN and Inf of any token are in the squares
        counts = [layer.count.double() for layer in layers]
        worst, counts = torch.stack([*worst, *counts]).view(2, -1).tolist()
        check_finite(self.layers, worst, next(iter(layers)).pivot.dtype)
        better = {}
        for (key, layer), count in zip(self.layers.items(), map(int, counts), strict=True):
            if 0 < layer.tokens < min(_SETTLED, count):
                better[key] = self.accumulators.better_pivot(key, layer)
            layer.tokens = count
        if better:
            self.move_pivots_(better)

    def layer(self, key: Key) -> LayerSums:
        """A layer's sums over all its tokens."""
        return self.layers[key]

    def check_pair(self, pair: Pair) -> None:
        """Nothing to do: partners are checked when they are pushed."""

    def waits(self) -> bool:
        """Whether features wait for more tokens before they are multiplied."""
        return self.accumulators.held() > 0

    def settle(self) -> None:
        self.accumulators.settle()

    def discard_open_batch(self) -> None:
        self.accumulators.discard_open_batch()

    def comoments(self, pair: Pair) -> Tensor:
        """Σ (x_a - mean_a)ᵀ(x_b - mean_b), a new matrix [d_a, d_b]: count times covariance."""
        products, (a, b) = self.accumulators.product(pair), (self.layers[key] for key in pair)
        mean_a, sum_b = (a.sum / a.count).to(products.dtype), b.sum.to(products.dtype)
        comoments = torch.addr(products, mean_a, sum_b, alpha=-1)
        if a is b:  # what split products leave out, low half times low half, adds up where both sides are one feature
            comoments.diagonal().copy_(a.sumsq - a.sum.square() / a.count)
        return comoments

    def correlation(self, pair: Pair) -> Tensor:
        """Pearson correlation, a new matrix [d_a, d_b]."""
        first, second = (self.layers[key] for key in pair)
        matrix = self.comoments(pair)
        rows, columns = first.inverse_std() / first.count, second.inverse_std()
        return matrix.mul_(rows.to(matrix.dtype)[:, None]).mul_(columns.to(matrix.dtype))

    def move_pivots_(self, pivots: Mapping[Key, Tensor]) -> None:
        """Express sums and products around new pivots; layers that are not named keep theirs."""
        self.accumulators.settle()  # waiting features are around the old pivots
        moves = _move_layers_(self.layers, pivots)
        for pair in self.pairs:
            self.accumulators.replace_(pair, _moved_(self.accumulators.product(pair), pair, moves))

    def merge_(self, other: Moments) -> None:
        """Add the tokens of `other`, which stays as it is: common pivots first, then plain sums."""
        theirs = {key: other.layers[key].copy_as(layer) for key, layer in self.layers.items()}
        pivots = merged_pivots(self.layers, theirs)
        self.accumulators.settle()
        moves, their_moves = _move_layers_(self.layers, pivots), _move_layers_(theirs, pivots)
        for pair in self.pairs:
            added = other.accumulators.product(pair).to(self.layers[pair[0]].pivot, copy=True)
            products = _moved_(self.accumulators.product(pair), pair, moves)
            self.accumulators.replace_(pair, products.add_(_moved_(added, pair, their_moves)))
        for key, layer in self.layers.items():
            layer.add_(theirs[key])

    def all_reduce_(self, group=None) -> None:
        """Sum over the processes of a group; the pivots become the common means first."""
        counts, pivots = common_pivots(self.layers, group)
        self.move_pivots_(pivots)
        sum_layers_over_ranks_(self.layers, counts, group)
        for pair in self.pairs:
            self.accumulators.replace_(pair, *sum_over_ranks([self.accumulators.product(pair)], group))

    def state_dict(self) -> dict[str, Tensor]:
        """All sums by name."""
        self.accumulators.settle()
        return layer_tensors(self.layers) | {
            name: self.accumulators.kept(pair) for name, pair in self._pair_names().items()
        }

    def load_state_dict_(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all sums, or raise FFMergeError if a tensor is missing, unknown or of another shape or dtype."""
        sums, pairs = layer_tensors(self.layers), self._pair_names()
        want = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in sums.items()}
        for name, pair in pairs.items():
            a, b = (self.layers[key].pivot for key in pair)
            want[name] = (a.dtype, [len(a), len(b)])
        if want.keys() != tensors.keys():
            missing, unknown = sorted(want.keys() - tensors.keys())[:3], sorted(tensors.keys() - want.keys())[:3]
            raise FFMergeError(f"state_dict: {missing=}, {unknown=}; make the state with the same layers and pairs")
        for name, tensor in tensors.items():
            if (got := (tensor.dtype, list(tensor.shape))) != want[name]:
                raise FFMergeError(f"state_dict: {name} is {got[0]} {got[1]}, want {want[name][0]} {want[name][1]}")
        self.accumulators.settle()
        for name, tensor in sums.items():
            tensor.copy_(tensors[name])
        for name, pair in pairs.items():
            self.accumulators.replace_(pair, tensors[name].to(self.layers[pair[0]].pivot.device))
        for layer in self.layers.values():
            layer.tokens = int(layer.count)

    def _pair_names(self) -> dict[str, Pair]:
        return {f"pair/{a}|{b}": (a, b) for a, b in self.pairs}


def check_finite(keys: Iterable[Key], worst: Iterable[float], dtype: torch.dtype) -> None:
    """Raise FFMergeError, naming layers, unless their largest squares are finite."""
    bad = [key for key, squares in zip(keys, worst, strict=True) if not squares <= torch.finfo(dtype).max]
    if bad:
        bad = list(dict.fromkeys(bad))
        raise FFMergeError(f"features of layers {bad} hold NaN, Inf or values beyond float32; start a new state")


def merged_pivots(ours: Mapping[Key, LayerSums], theirs: Mapping[Key, LayerSums]) -> dict[Key, Tensor]:
    """The mean of both sides' tokens, for each layer."""
    counts = {key: (layer.count + theirs[key].count).clamp(min=1) for key, layer in ours.items()}
    return {key: (layer.total() + theirs[key].total()) / counts[key] for key, layer in ours.items()}


def common_pivots(layers: Mapping[Key, LayerSums], group) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
    """(number, mean) of all processes' tokens, for each layer."""
    totals = torch.cat([part for layer in layers.values() for part in (layer.count.double()[None], layer.total())])
    sum_over_ranks([totals], group)
    totals = dict(zip(layers, totals.split([1 + len(layer.pivot) for layer in layers.values()]), strict=True))
    return {k: t[0] for k, t in totals.items()}, {k: t[1:] / t[0].clamp(min=1) for k, t in totals.items()}


def sum_layers_over_ranks_(layers: Mapping[Key, LayerSums], counts: Mapping[Key, Tensor], group) -> None:
    """Add up the sums of all processes, which are around the same pivots; `counts` are added up already."""
    sums = torch.cat([part for layer in layers.values() for part in (layer.sum, layer.sumsq)])
    sum_over_ranks([sums], group)
    widths = [2 * len(layer.pivot) for layer in layers.values()]
    for (key, layer), part in zip(layers.items(), sums.split(widths), strict=True):
        for mine, common in zip((layer.sum, layer.sumsq), part.chunk(2), strict=True):
            mine.copy_(common)
        layer.count.copy_(counts[key])
        layer.tokens = int(layer.count)


def layer_tensors(layers: Mapping[Key, LayerSums]) -> dict[str, Tensor]:
    """The sums by name."""
    return {
        f"layer/{key}/{name}": tensor
        for key, layer in layers.items()
        for name, tensor in zip(_NAMES, layer.tensors(), strict=True)
    }


def _move_layers_(layers: Mapping[Key, LayerSums], pivots: Mapping[Key, Tensor]) -> dict[Key, PivotMove]:
    return {key: layer.move_pivot_(pivots.get(key, layer.pivot)) for key, layer in layers.items()}


def _moved_(products: Tensor, pair: Pair, moves: Mapping[Key, PivotMove]) -> Tensor:
    """Products after their layers' pivots moved: Σ(x_a+s_a)ᵀ(x_b+s_b) = Σx_aᵀx_b + (Σx_a)ᵀs_b + s_aᵀ(Σx_b + n s_b)."""
    (sum_a, shift_a, _), (_, shift_b, sum_b) = ([v.to(products.dtype) for v in moves[key]] for key in pair)
    return products.addr_(sum_a, shift_b).addr_(shift_a, sum_b)
