"""One FFN for many inputs in plain PyTorch: the specification of the `shared_ffn` op."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..common.activations import BACKWARD, FORWARD
from .weights import FFNWeights, GradientSums, activate


def can_run(tensor: Tensor | None = None) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    xs: list[Tensor],  # [T_i, d]
    weights: FFNWeights,
    activation: str,
    recompute: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs [T_i, d_out] and what the policy keeps of each input: nothing ("full"), the pre-activations of up (and
    gate) ("activation"), or these and the hidden features ("none")."""
    outputs, saved = [], []
    for x in xs:
        pre = weights.pre_activations(x)
        hidden = activate(pre, activation)
        outputs.append(F.linear(hidden, weights.down, weights.down_bias))
        saved += {"none": [*pre, hidden], "activation": pre, "full": []}[recompute]
    return outputs, saved


def backward(
    grads: list[Tensor],  # [T_i, d_out]
    xs: list[Tensor],
    saved: list[Tensor],
    weights: FFNWeights,
    activation: str,
    recompute: str,
    needs: list[bool],  # a gradient for: any x, and each of the weights
    into: list[Tensor | None] | None = None,  # buffers, one for each weight, that its gradient is added to
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the inputs, and of each weight that needs one: the sum over all inputs in one buffer, which is
    float32 (float64 for float64 weights)."""
    sums = GradientSums(weights, needs[1:], into)
    kept = len(saved) // max(len(xs), 1)
    dxs = []
    for i, (dy, x) in enumerate(zip(grads, xs, strict=True)):
        mine = saved[i * kept : (i + 1) * kept] or weights.pre_activations(x)
        pre = mine[: weights.halves]
        hidden = mine[len(pre)] if recompute == "none" else activate(pre, activation)
        d_up, d_gate = _pre_activation_grads(dy @ weights.down, pre, activation)
        sums.add_(x, dy, d_up, d_gate, hidden)
        if needs[0]:
            dxs.append(weights.input_gradient(d_up, d_gate))
    return dxs, sums.needed()


def _pre_activation_grads(d_hidden: Tensor, pre: list[Tensor], activation: str) -> tuple[Tensor, Tensor | None]:
    act, derivative = FORWARD[activation], BACKWARD[activation]
    if len(pre) == 1:
        return derivative(d_hidden, pre[0]), None
    up, gate = pre
    return d_hidden * act(gate), derivative(d_hidden * up, gate)
