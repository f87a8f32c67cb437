"""The four ops, importable and useful alone. Each room: op.py (checks, dispatch), reference.py (specification)."""

from .assignment import Assignment, assign
from .correlation import CorrelationState, correlation_accumulate_

__all__ = ["Assignment", "CorrelationState", "assign", "correlation_accumulate_"]
