"""Streaming correlation of FFN features between layers."""

from .op import correlation_accumulate_
from .state import CorrelationState

__all__ = ["CorrelationState", "correlation_accumulate_"]
