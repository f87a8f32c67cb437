"""Thin modules over the ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import project_weight
from .ops.shared_ffn.op import apply_ffn
from .ops.shared_ffn.weights import FFNWeights


class SharedFFN(nn.Module):
    """One FFN for the inputs of many layers; its Linear modules `up`, `down` (and `gate`) hold the weights.

    Args:
        d_model, d_ff: widths.
        activation: relu, gelu, gelu_tanh, silu, relu2 or quick_gelu.
        gated: down(act(gate x) · up x) instead of down(act(up x)).
        bias: biases in all Linear modules.
        recompute: what backward computes again, see `ops.shared_ffn`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        recompute: str = "activation",
        device=None,
        dtype=None,
    ):
        super().__init__()
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.up = nn.Linear(d_model, d_ff, **options)
        self.gate = nn.Linear(d_model, d_ff, **options) if gated else None
        self.down = nn.Linear(d_ff, d_model, **options)
        self.activation, self.recompute = activation, recompute

    def forward(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """x [..., d_model] or a list of [T_i, d_model] -> the same shapes."""
        gate, gate_bias = (None, None) if self.gate is None else (self.gate.weight, self.gate.bias)
        weights = FFNWeights(self.up.weight, gate, self.down.weight, self.up.bias, gate_bias, self.down.bias)
        return apply_ffn(x, weights, self.activation, self.recompute)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, recompute={self.recompute}"


class ProjectedLinear(nn.Module):
    """A frozen Linear made smaller by trained projections: W_C = P_out · W · P_in + R, b_C = P_out · b + r (paper B).

    The projections start as the selection of `out_index` and `in_index`, R and r as 0: at first this is `linear` hard
    pruned to those rows and columns. The plain autograd form: W_C is computed in every forward.

    Args:
        linear: the module to shrink; its tensors become frozen buffers `weight` and `bias`, not copies.
        out_index, in_index: int64 indices of the outputs and inputs to keep; None keeps all and has no projection.
        residual: train R (and r).
    """

    def __init__(
        self, linear: nn.Linear, out_index: Tensor | None = None, in_index: Tensor | None = None, residual: bool = True
    ):
        super().__init__()
        weight = linear.weight.detach()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.p_out = None if out_index is None else nn.Parameter(_selection(out_index, weight))
        self.p_in = None if in_index is None else nn.Parameter(_selection(in_index, weight.T).T.contiguous())
        self.out_features = len(weight) if out_index is None else len(out_index)
        self.in_features = weight.shape[1] if in_index is None else len(in_index)
        self.residual = self.residual_bias = None
        if residual:
            self.residual = nn.Parameter(weight.new_zeros(self.out_features, self.in_features))
            if linear.bias is not None:
                self.residual_bias = nn.Parameter(weight.new_zeros(self.out_features))

    def projected(self) -> tuple[Tensor, Tensor | None]:
        """W_C [out_features, in_features] and b_C [out_features] or None."""
        weight = project_weight(self.weight, self.p_out, self.p_in, self.residual)
        bias = self.bias
        if bias is not None and self.p_out is not None:
            bias = project_weight(bias[:, None], self.p_out)[:, 0]
        return weight, bias if self.residual_bias is None else bias + self.residual_bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return F.linear(x, *self.projected())

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """A plain Linear with W_C and b_C."""
        weight, bias = self.projected()
        options = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
        linear = nn.Linear(self.in_features, self.out_features, **options)
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
        return linear

    def extra_repr(self) -> str:
        full = list(self.weight.shape)
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={full}"


def _selection(index: Tensor, weight: Tensor) -> Tensor:
    """The 0/1 matrix [r, n] that selects rows of weight [n, ...]."""
    rows = torch.arange(len(index), device=weight.device)
    selection = weight.new_zeros(len(index), len(weight))
    selection[rows, index.to(weight.device)] = 1
    return selection
