"""Moments of several states as one (Chan et al. 1979): common pivots first, then plain sums."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...support.errors import FFMergeError

if TYPE_CHECKING:
    from .state import CorrelationState


def move_pivots_(state: CorrelationState, pivots: Mapping[Hashable, Tensor]) -> None:
    """Express the sums around new pivots: Σ(x_a+s_a)ᵀ(x_b+s_b) = Σx_aᵀx_b + s_aᵀΣx_b + (Σx_a)ᵀs_b + n s_aᵀs_b."""
    layers = state._layers
    state._accumulators.settle()  # waiting features are around the old pivots
    old_sums = {key: layer.sum.clone() for key, layer in layers.items()}
    shifts = {key: layer.move_pivot_(pivots.get(key, layer.pivot)) for key, layer in layers.items()}
    for a, b in state.pairs:
        products = state._accumulators.product((a, b))
        moved = (old_sums[a], shifts[b], shifts[a], layers[b].sum)  # the last one is Σx_b + n s_b
        sum_a, shift_b, shift_a, sum_b = (v.to(products.dtype) for v in moved)
        products.addr_(sum_a, shift_b).addr_(shift_a, sum_b)
        state._accumulators.replace_((a, b), products)


def merge_(state: CorrelationState, other: CorrelationState) -> None:
    """Add the tokens of `other`, which stays as it is."""
    for name in ("widths", "pairs", "activation"):
        mine, theirs = getattr(state, name), getattr(other, name)
        if mine != theirs:
            raise FFMergeError(f"merge_: the states differ in {name}: {mine} and {theirs}")
    for each in (state, other):
        each._no_open_batch()
    other = _copy(other, state)
    pivots = {}
    for key, layer in state._layers.items():
        count = (layer.count + other._layers[key].count).clamp(min=1)
        pivots[key] = (layer.total() + other._layers[key].total()) / count
    move_pivots_(state, pivots)
    move_pivots_(other, pivots)
    for key, layer in state._layers.items():
        for name in ("count", "sum", "sumsq"):
            getattr(layer, name).add_(getattr(other._layers[key], name))
        layer.tokens += other._layers[key].tokens
    for pair in state.pairs:
        products = state._accumulators.product(pair)
        state._accumulators.replace_(pair, products.add_(other._accumulators.product(pair)))


def all_reduce_(state: CorrelationState, group=None) -> None:
    """Sum over the processes of a group; the pivots become the common means first."""
    import torch.distributed as dist

    state._no_open_batch()
    layers = list(state._layers.values())
    totals = torch.cat([torch.cat([layer.count.double()[None], layer.total()]) for layer in layers])
    dist.all_reduce(totals, group=group)
    pivots, counts = {}, []
    for key, part in zip(state.widths, totals.split([w + 1 for w in state.widths.values()]), strict=True):
        counts.append(part[0].round().long())
        pivots[key] = part[1:] / part[0].clamp(min=1)
    move_pivots_(state, pivots)
    sums = torch.cat([torch.cat([layer.sum, layer.sumsq]) for layer in layers])
    dist.all_reduce(sums, group=group)
    for layer, count, part in zip(layers, counts, sums.split([2 * w for w in state.widths.values()]), strict=True):
        layer.count.copy_(count)
        layer.sum, layer.sumsq = (half.clone() for half in part.chunk(2))
        layer.tokens = int(count)
    for pair in state.pairs:
        products = state._accumulators.product(pair)
        dist.all_reduce(products, group=group)
        state._accumulators.replace_(pair, products)


def _copy(state: CorrelationState, like: CorrelationState) -> CorrelationState:
    """A copy on the device and with the accumulators of `like`."""
    copy = type(like)(like.widths, like.pairs, like.device, like.compute, like.activation, like.max_memory)
    for key, layer in copy._layers.items():
        for mine, theirs in zip(layer.tensors(), state._layers[key].tensors(), strict=True):
            mine.copy_(theirs)
        layer.tokens = state._layers[key].tokens
    for pair in copy.pairs:
        products = state._accumulators.product(pair)
        copy._accumulators.replace_(pair, products.to(copy.device, copy.dtype))
    return copy
