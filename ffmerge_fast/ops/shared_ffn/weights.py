"""The weights of one FFN, and the sums of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.activations import FORWARD


class FFNWeights(NamedTuple):
    """One FFN: down(act(up x)), or with a gate down(act(gate x) · up x). The layout is nn.Linear's."""

    up: Tensor  # [f, d]
    gate: Tensor | None  # [f, d]
    down: Tensor  # [d_out, f]
    up_bias: Tensor | None  # [f]
    gate_bias: Tensor | None  # [f]
    down_bias: Tensor | None  # [d_out]

    @property
    def halves(self) -> int:
        """How many pre-activations there are: of up, and of gate."""
        return 1 if self.gate is None else 2

    def projection(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of "up", "gate" or "down"."""
        return getattr(self, name), getattr(self, f"{name}_bias")

    def to(self, dtype: torch.dtype) -> FFNWeights:
        """The same in a dtype; what has it already is no copy."""
        for weight in self:
            if weight is not None and weight.dtype != dtype:
                return FFNWeights(*(w if w is None else w.to(dtype) for w in self))
        return self

    def pre_activations(self, x: Tensor) -> list[Tensor]:
        """[..., d] -> [..., f] of up, and of gate if there is one."""
        pre = [F.linear(x, self.up, self.up_bias)]
        return pre if self.gate is None else [*pre, F.linear(x, self.gate, self.gate_bias)]

    def hidden(self, x: Tensor, activation: str) -> Tensor:
        """[..., d] -> [..., f]: what W_down gets."""
        return activate(self.pre_activations(x), activation)

    def input_gradient(self, d_up: Tensor, d_gate: Tensor | None) -> Tensor:
        """[T, f] -> [T, d]."""
        return d_up @ self.up if d_gate is None else (d_up @ self.up).addmm_(d_gate, self.gate)


def activate(pre: Sequence[Tensor], activation: str) -> Tensor:
    """act(up), or with a gate act(gate) · up, of the pre-activations of up and gate."""
    act = FORWARD[activation]
    return act(pre[0]) if len(pre) == 1 else act(pre[1]) * pre[0]


class GradientSums:
    """One buffer for each weight that needs a gradient, float32 (float64 for float64), over all tokens.

    Args:
        weights: six tensors or None.
        needs: which of them need a gradient.
        into: buffers that gradients are added to, where given; the others are new.
        rounded: in a lower precision, multiply in it and round what each call of `add_` contributes, where the
            processor cannot add such products to float32; else they are multiplied in float32.
    """

    def __init__(
        self, weights: FFNWeights, needs: list[bool], into: list[Tensor | None] | None = None, rounded: bool = False
    ):
        self._rounded = rounded
        self._dtype = torch.float64 if weights.up.dtype == torch.float64 else torch.float32
        self._weights, self._needs = weights, needs
        self._sums = [given if need else None for given, need in zip(into or [None] * 6, needs, strict=True)]

    def add_(
        self,
        x: Tensor,
        dy: Tensor,
        d_up: Tensor,
        d_gate: Tensor | None,
        hidden: Tensor,
        d_up_parts: Tensor | None = None,
        d_gate_parts: Tensor | None = None,
    ) -> None:
        """Add what some tokens contribute; the gradients of the pre-activations and the output are [T, ...].

        Parts: matrices with the column sums of d_up and d_gate but fewer rows, where somebody summed already.
        """
        rows = d_up if d_up_parts is None else d_up_parts, d_gate if d_gate_parts is None else d_gate_parts
        outer = ((d_up, x), (d_gate, x), (dy, hidden), (rows[0], None), (rows[1], None), (dy, None))
        for i, (d_out, inputs) in enumerate(outer):
            if self._needs[i]:
                self._sums[i] = self._added(self._sums[i], d_out, inputs)

    def needed(self) -> list[Tensor]:
        """The sums, without those that nobody needs."""
        pairs = zip(self._sums, self._weights, self._needs, strict=True)
        return [self._zeros(weight) if total is None else total for total, weight, need in pairs if need]

    def _added(self, total: Tensor | None, d_out: Tensor, inputs: Tensor | None) -> Tensor:
        if inputs is None:
            part = d_out.sum(0, dtype=self._dtype)
            return part if total is None else total.add_(part)
        if d_out.is_cuda and d_out.dtype != self._dtype and hasattr(torch.ops.aten.addmm, "dtype_out"):
            total = inputs.new_zeros(d_out.shape[1], inputs.shape[1], dtype=self._dtype) if total is None else total
            return torch.addmm(total, d_out.T, inputs, out_dtype=self._dtype, out=total)
        if d_out.dtype != self._dtype and self._rounded:
            part = (d_out.T @ inputs).to(self._dtype)
            return part if total is None else total.add_(part)
        d_out, inputs = d_out.to(self._dtype), inputs.to(self._dtype)
        return d_out.T @ inputs if total is None else total.addmm_(d_out.T, inputs)

    def _zeros(self, weight: Tensor) -> Tensor:
        return torch.zeros(weight.shape, dtype=self._dtype, device=weight.device)
