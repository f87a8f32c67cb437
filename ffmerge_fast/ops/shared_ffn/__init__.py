"""One FFN applied to the inputs of many layers."""

from .op import shared_ffn

__all__ = ["shared_ffn"]
