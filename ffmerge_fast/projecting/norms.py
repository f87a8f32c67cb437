"""Norms of the residual stream: their gain and bias, whatever form the class keeps them in."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def gain_at_zero(norm: nn.Module) -> float:
    """1 for norms that multiply by 1 + weight (Gemma), 0 for those that multiply by the weight."""
    probe = copy.deepcopy(norm).double().cpu()
    for parameter in probe.parameters():
        parameter.zero_()
    return float(probe(torch.arange(norm.weight.numel(), dtype=torch.float64)[None]).abs().max() > 0)


@dataclass(frozen=True)
class Gain:
    """What a norm multiplies by and adds, in float64."""

    norm: nn.Module

    @property
    def known(self) -> bool:
        """Whether it has a gain (OLMo's norms have none)."""
        return getattr(self.norm, "weight", None) is not None

    @property
    def value(self) -> Tensor:
        """[d]"""
        return self.norm.weight.detach().double() + gain_at_zero(self.norm)

    @property
    def bias(self) -> Tensor | None:
        """[d]"""
        bias = getattr(self.norm, "bias", None)
        return None if bias is None else bias.detach().double()

    @torch.no_grad()
    def set_(self, value: Tensor, bias: Tensor | None = None) -> None:
        """Take over another gain and, where there is one, bias."""
        self.norm.weight.copy_(value - gain_at_zero(self.norm))
        if bias is not None and self.bias is not None:
            self.norm.bias.copy_(bias)
