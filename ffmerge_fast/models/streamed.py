"""Which models are streamed, and the one-line refusal of what needs all weights in memory."""

from __future__ import annotations

from torch import nn

from ..support.errors import FFMergeError

HANDLE = "_weight_stream"  # attribute of a streamed model


def is_streamed(model: nn.Module) -> bool:
    """Whether `stream_` was called on the model."""
    return getattr(model, HANDLE, None) is not None


def refusal(action: str) -> FFMergeError:
    return FFMergeError(
        f"{action}: this model is streamed, its weights are not all in memory; call ffmerge_fast.unstream_(model) first"
    )


def refuse_streamed(model: nn.Module, action: str) -> None:
    """Raise FFMergeError if `stream_` was called on the model."""
    if is_streamed(model):
        raise refusal(action)
