"""Projected weights of projected compression."""

from .op import project_weight

__all__ = ["project_weight"]
