"""The `correlation` op: the one call that takes a batch of all layers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .state import CorrelationState


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
