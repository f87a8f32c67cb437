"""The `correlation` op: registration, and the one call that takes a batch of all layers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common import backends
from ..common.registry import define_op

if TYPE_CHECKING:
    from .state import CorrelationState


def _accumulate_layer_(x: Tensor, *rest) -> Tensor:
    return backends.select("correlation", x).accumulate_layer_(x, *rest)


def _accumulate_layer_fake(x, mask, count, pivot, sum_, sumsq, activation, compute, set_pivot):
    return x.new_empty(x.shape, dtype=torch.bfloat16 if compute == "bf16" else pivot.dtype)


def _accumulate_pair_(a: Tensor, b: Tensor, products: Tensor) -> None:
    backends.select("correlation", products).accumulate_pair_(a, b, products)


accumulate_layer_ = define_op(
    "_correlation_accumulate_layer_(Tensor x, Tensor? mask, Tensor(a!) count, Tensor(b!) pivot, Tensor(c!) sum,"
    " Tensor(d!) sumsq, str? activation, str compute, bool set_pivot) -> Tensor",
    _accumulate_layer_,
    _accumulate_layer_fake,
)
accumulate_pair_ = define_op(
    "_correlation_accumulate_pair_(Tensor a, Tensor b, Tensor(a!) products) -> ()",
    _accumulate_pair_,
    lambda a, b, products: None,
)


def correlation_accumulate_(
    state: CorrelationState, features: Mapping[Hashable, Tensor], mask: Tensor | None = None
) -> CorrelationState:
    """Add one batch of features of all layers to `state`, in place (paper A, eq. 1, as streaming moments).

    Args:
        state: the accumulators.
        features: for every layer of the state, its features [T, d_ff] (or [..., d_ff] with T tokens in all);
            float32, bfloat16, float16 or float64.
        mask: tokens to count (bool or 0/1, T elements in any shape); None counts all.

    Raises:
        FFMergeError: a layer is missing or unknown, a width, dtype, device or token count does not fit (the state
            is unchanged then), or the features hold NaN or Inf (the state is spoilt then).
    """
    state.check_batch(features, mask)
    for key, x in features.items():
        state.push(key, x, mask)
    state.end_batch()
    return state
