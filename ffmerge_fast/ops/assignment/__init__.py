"""Exact linear assignment."""

from .op import Assignment, assign

__all__ = ["Assignment", "assign"]
