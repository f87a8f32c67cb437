"""The four ops, importable and useful alone. Each room: op.py (checks, dispatch), reference.py (specification)."""

from .assignment import Assignment, assign
from .correlation import CorrelationState, correlation_accumulate_
from .projection import project_weight
from .shared_ffn import shared_ffn

__all__ = ["Assignment", "CorrelationState", "assign", "correlation_accumulate_", "project_weight", "shared_ffn"]
