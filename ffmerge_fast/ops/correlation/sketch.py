"""Sketched second moments: a ring of m rows per layer, from which any pair's correlation is estimated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...support.distributed import rank, sum_over_ranks
from ...support.errors import FFMergeError
from ...support.machine import free_memory
from ...support.sizes import format_bytes
from ..common.activations import FORWARD
from . import registered
from .moments import (
    Key,
    LayerSums,
    Pair,
    check_finite,
    common_pivots,
    layer_tensors,
    merged_pivots,
    sum_layers_over_ranks_,
)
from .ring import add_rows_, signs

SMALLEST = 16  # rows
_BLOCK = 256  # tokens that are added together, whatever batches they came in: equal bits for any split
_PIVOT_ROWS = 64  # of the first block: a pivot need only be near the mean
_MERGED, _RANKS = 1 << 40, 1 << 50  # where signs of whole rings begin, behind those of tokens


@dataclass
class Ring:
    """One layer's sketch.

    Token t of a layer is added, times a sign that hashes t, to row t mod m. For two layers that saw the same tokens
    E[rows_aᵀ rows_b] = Σ_t x_a(t)ᵀ x_b(t) (Charikar et al. 2002); the relative standard deviation is about 1/√m.
    """

    rows: Tensor  # [m, d] float32, of features minus the layer's pivot
    ones: Tensor  # [m] float32, the same of the feature 1: moves the pivot, and centres, without error
    waiting: Tensor  # [w, d] features of the last tokens, too few to be a block
    position: int = 0  # tokens that are in the rows

    @classmethod
    def empty(cls, m: int, width: int, device: torch.device) -> Ring:
        rows = torch.zeros(m, width, device=device)
        return cls(rows, torch.zeros(m, device=device), torch.empty(0, width, device=device))

    def move_pivot_(self, shift: Tensor) -> None:
        """Add `shift` [d], the old minus the new pivot, to every token."""
        self.rows.addr_(self.ones, shift.float())

    def flip_(self, start: int) -> None:
        """New signs for whole rows: a ring of other tokens is then independent of one with the same positions."""
        flips = signs(start, len(self.ones), self.ones.device)
        self.rows.mul_(flips[:, None])
        self.ones.mul_(flips)


class SketchedMoments:
    """The sums and rings of layers; the same face as `Moments`. Every pair of layers with the same tokens can be read.

    Tokens are added in whole blocks of their positions, so that sums do not depend on the batches.
    """

    def __init__(self, widths: Mapping[Key, int], m: int, device: torch.device, activation: str | None):
        self.m, self.activation = m, activation
        _check_memory(widths, m, device)
        self.layers = {key: LayerSums.empty(width, torch.float32, device) for key, width in widths.items()}
        self.rings = {key: Ring.empty(m, width, device) for key, width in widths.items()}
        self._last_mask: tuple[Tensor | None, Tensor | None] = (None, None)

    def push(self, key: Key, x: Tensor, mask: Tensor | None, seen: Iterable[Key]) -> None:
        """Add one layer's tokens."""
        if x.dtype == torch.float64:
            x = x.float()
        ring, at = self.rings[key], self._counted(mask)
        tokens = len(x) if at is None else len(at)
        filled = (ring.position + len(ring.waiting)) % _BLOCK
        head = min(-filled % _BLOCK, tokens) if len(ring.waiting) else 0
        if head:  # completes the block that waits, or not yet
            ring.waiting = torch.cat([ring.waiting, _taken(x, at, 0, head)])
            if (filled + head) % _BLOCK:
                return
            self._add_(key, ring.waiting, None)
        tail = tokens - (ring.position + tokens - head) % _BLOCK
        if tail > head:
            self._add_(key, x[head:tail], None) if at is None else self._add_(key, x, at[head:tail])
        ring.waiting = _taken(x, at, max(head, tail), tokens).clone()

    def end_batch(self) -> None:
        """Count the batch's tokens (one device sync).

        Raises:
            FFMergeError: features are not finite (NaN, Inf or beyond float32), naming the layers.
        """
        for key, layer in self.layers.items():
            layer.tokens = self.rings[key].position + len(self.rings[key].waiting)
        worst = [layer.sumsq.max() for layer in self.layers.values()]
        waiting = (ring.waiting.double().square() for ring in self.rings.values())
        worst += [squares.max() if len(squares) else squares.new_zeros(()) for squares in waiting]
        check_finite(list(self.layers) * 2, torch.stack(worst).tolist(), torch.float32)

    def layer(self, key: Key) -> LayerSums:
        """A layer's sums over all its tokens."""
        self._settle_(key)
        return self.layers[key]

    def comoments(self, pair: Pair) -> Tensor:
        """The estimate of Σ (x_a - mean_a)ᵀ(x_b - mean_b), a new matrix [d_a, d_b]."""
        product = self._product(pair, slice(None), *(torch.ones_like(self.layer(key).sum) for key in pair))
        if pair[0] == pair[1]:
            layer = self.layer(pair[0])
            product.diagonal().copy_(layer.variance() * layer.count)
        return product

    def correlation(self, pair: Pair, rows: slice = slice(None)) -> Tensor:
        """The estimated Pearson correlation, a new matrix [d_a, d_b]; by some rows of the rings only, if asked."""
        first, second = (self.layer(key) for key in pair)
        share = len(range(*rows.indices(self.m))) / self.m
        product = self._product(pair, rows, first.inverse_std() / (first.count * share), second.inverse_std())
        if pair[0] == pair[1]:
            product.diagonal().copy_(first.variance() > 0)
        return product

    def check_pair(self, pair: Pair) -> None:
        """Raise FFMergeError unless both layers saw the same number of tokens: else their rows do not fit."""
        a, b = (self.layers[key].tokens for key in pair)
        if a != b:
            raise FFMergeError(f"layers {pair[0]!r} and {pair[1]!r} saw {a} and {b} tokens: want the same ones")

    def waits(self) -> bool:
        """Never: what waits is a part of `state_dict`."""
        return False

    def settle(self) -> None:
        """Add what waits; where later blocks begin is then no longer independent of the batches."""
        for key in self.layers:
            self._settle_(key)

    def discard_open_batch(self) -> None:
        """Nothing to do: layers with other numbers of tokens are no pair."""

    def merge_(self, other: SketchedMoments) -> None:
        """Add the tokens of `other`, which stays as it is."""
        self.settle()
        other.settle()
        theirs = {key: other.layers[key].copy_as(layer) for key, layer in self.layers.items()}
        for key, pivot in merged_pivots(self.layers, theirs).items():
            layer, ring, added = self.layers[key], self.rings[key], other.rings[key]
            added = Ring(added.rows.to(ring.rows, copy=True), added.ones.to(ring.ones, copy=True), added.waiting)
            added.flip_(_MERGED + ring.position)
            for sums, each in ((layer, ring), (theirs[key], added)):
                each.move_pivot_(sums.move_pivot_(pivot).shift)
            layer.add_(theirs[key])
            ring.rows.add_(added.rows)
            ring.ones.add_(added.ones)
            ring.position = layer.tokens

    def all_reduce_(self, group=None) -> None:
        """Sum over the processes of a group; each rank's rings get signs of their own first."""
        self.settle()
        counts, pivots = common_pivots(self.layers, group)
        for key, ring in self.rings.items():
            ring.move_pivot_(self.layers[key].move_pivot_(pivots[key]).shift)
            ring.flip_(_RANKS + rank() * self.m)
            sum_over_ranks([ring.rows, ring.ones], group)
        sum_layers_over_ranks_(self.layers, counts, group)
        for key, ring in self.rings.items():
            ring.position = self.layers[key].tokens

    def state_dict(self) -> dict[str, Tensor]:
        """All sums and rings by name; what waits too, so that nothing is rounded otherwise for having been saved."""
        parts = ("rows", "ones", "waiting")
        rings = {f"ring/{k}/{part}": getattr(ring, part) for k, ring in self.rings.items() for part in parts}
        return layer_tensors(self.layers) | rings

    def load_state_dict_(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all sums, or raise FFMergeError if a tensor is missing, unknown or of another shape or dtype."""
        mine = self.state_dict()
        if mine.keys() != tensors.keys():
            missing, unknown = sorted(mine.keys() - tensors.keys())[:3], sorted(tensors.keys() - mine.keys())[:3]
            raise FFMergeError(f"state_dict: {missing=}, {unknown=}; make the state with the same layers and sketch")
        for name, tensor in tensors.items():
            want, waits = mine[name], name.endswith("/waiting")
            same = tensor.shape[1:] == want.shape[1:] and len(tensor) < _BLOCK if waits else tensor.shape == want.shape
            if not same or tensor.ndim != want.ndim or not (waits or tensor.dtype == want.dtype):
                got, shape = f"{tensor.dtype} {list(tensor.shape)}", list(want.shape)
                raise FFMergeError(f"state_dict: {name} is {got}, want {want.dtype} {shape}; is it of another sketch?")
        for key, ring in self.rings.items():
            ring.waiting = tensors[f"ring/{key}/waiting"].to(ring.rows.device, copy=True)
        for name, tensor in self.state_dict().items():
            tensor.copy_(tensors[name])
        for key, layer in self.layers.items():
            self.rings[key].position = int(layer.count)
            layer.tokens = int(layer.count) + len(self.rings[key].waiting)

    def _counted(self, mask: Tensor | None) -> Tensor | None:
        """Rows of the tokens that count, int64, or None for all; layers mostly share a mask, so the last is kept."""
        if mask is None:
            return None
        if self._last_mask[0] is not mask:
            self._last_mask = (mask, None if bool(mask.all()) else mask.nonzero().flatten())
        return self._last_mask[1]

    def _add_(self, key: Key, x: Tensor, at: Tensor | None) -> None:
        layer, ring = self.layers[key], self.rings[key]
        tokens = len(x) if at is None else len(at)
        if not ring.position:
            layer.pivot.copy_(_mean(_taken(x, at, 0, min(_PIVOT_ROWS, tokens)), self.activation))
        first, sign = ring.position % self.m, signs(ring.position, tokens, x.device)
        sums = layer.pivot, ring.rows, first, layer.sum, layer.sumsq
        registered.accumulate_ring_(x, at, sign, *sums, self.activation)
        add_rows_(ring.ones, first, sign)
        layer.count += tokens
        ring.position += tokens
        ring.waiting = ring.waiting[:0]

    def _settle_(self, key: Key) -> None:
        if len(self.rings[key].waiting):
            self._add_(key, self.rings[key].waiting, None)

    def _product(self, pair: Pair, rows: slice, *scales: Tensor) -> Tensor:
        """The product of two centred rings, their features scaled."""
        sides = []
        for key, scale in zip(pair, scales, strict=True):
            layer, ring = self.layer(key), self.rings[key]
            mean = (layer.sum / layer.count).float()
            sides.append(torch.addr(ring.rows[rows], ring.ones[rows], mean, alpha=-1).mul_(scale.float()))
        with torch.autocast(sides[0].device.type, enabled=False):
            return sides[0].T @ sides[1]


def _check_memory(widths: Mapping[Key, int], m: int, device: torch.device) -> None:
    needed, free = 4 * m * sum(widths.values()), free_memory(device)
    if free is not None and needed > free:
        raise FFMergeError(
            f"sketch: {m} rows of {len(widths)} layers need {format_bytes(needed)} on {device}, {format_bytes(free)} "
            "are free: give fewer rows"
        )


def _taken(x: Tensor, at: Tensor | None, start: int, stop: int) -> Tensor:
    return x[start:stop] if at is None else x[at[start:stop]]


def _mean(x: Tensor, activation: str | None) -> Tensor:
    """The mean [d] of a few tokens, on the inputs' grid so that differences are exact."""
    if activation is not None:
        return FORWARD[activation](x.float()).mean(0, dtype=torch.float64)
    return x.mean(0, dtype=torch.float64).to(x.dtype)
