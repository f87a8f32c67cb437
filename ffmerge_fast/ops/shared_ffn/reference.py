"""One FFN for many inputs in plain PyTorch: the specification of the `shared_ffn` op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._activations import BACKWARD, FORWARD


def can_run(tensor: Tensor | None = None) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    xs: list[Tensor],  # [T_i, d]
    up: Tensor,  # [f, d]
    gate: Tensor | None,
    down: Tensor,  # [d_out, f]
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    recompute: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs [T_i, d_out] and what the policy keeps of each input: nothing ("full"), the pre-activations of up (and
    gate) ("activation"), or these and the hidden features ("none")."""
    outputs, saved = [], []
    for x in xs:
        pre = _pre_activations(x, up, gate, up_bias, gate_bias)
        hidden = _hidden(pre, activation)
        outputs.append(F.linear(hidden, down, down_bias))
        saved += {"none": [*pre, hidden], "activation": pre, "full": []}[recompute]
    return outputs, saved


def backward(
    grads: list[Tensor],  # [T_i, d_out]
    xs: list[Tensor],
    saved: list[Tensor],
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    recompute: str,
    needs: list[bool],  # a gradient for: any x, up, gate, down, up_bias, gate_bias, down_bias
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the inputs, and of each weight that needs one: the sum over all inputs in one buffer, which is
    float32 (float64 for float64 weights)."""
    weights = (up, gate, down, up_bias, gate_bias, down_bias)
    sum_dtype = torch.float64 if up.dtype == torch.float64 else torch.float32
    sums = [torch.zeros_like(w, dtype=sum_dtype) if need else None for w, need in zip(weights, needs[1:], strict=True)]
    kept = len(saved) // max(len(xs), 1)
    dxs = []
    for i, (dy, x) in enumerate(zip(grads, xs, strict=True)):
        mine = saved[i * kept : (i + 1) * kept] or _pre_activations(x, up, gate, up_bias, gate_bias)
        pre = mine[: 1 if gate is None else 2]
        hidden = mine[len(pre)] if recompute == "none" else _hidden(pre, activation)
        d_up, d_gate = _pre_activation_grads(dy @ down, pre, activation)
        for total, d_out, inputs in zip(sums[:3], (d_up, d_gate, dy), (x, x, hidden), strict=True):
            if total is not None:
                total.addmm_(d_out.T.to(sum_dtype), inputs.to(sum_dtype))
        for total, d_out in zip(sums[3:], (d_up, d_gate, dy), strict=True):
            if total is not None:
                total += d_out.sum(0, dtype=sum_dtype)
        if needs[0]:
            dxs.append(d_up @ up if gate is None else (d_up @ up).addmm_(d_gate, gate))
    return dxs, [total for total in sums if total is not None]


def _pre_activations(x, up, gate, up_bias, gate_bias) -> list[Tensor]:
    pre = [F.linear(x, up, up_bias)]
    return pre if gate is None else [*pre, F.linear(x, gate, gate_bias)]


def _hidden(pre: list[Tensor], activation: str) -> Tensor:
    """act(up) of a plain FFN, act(gate) · up of a gated one."""
    act = FORWARD[activation]
    return act(pre[0]) if len(pre) == 1 else act(pre[1]) * pre[0]


def _pre_activation_grads(d_hidden: Tensor, pre: list[Tensor], activation: str) -> tuple[Tensor, Tensor | None]:
    act, derivative = FORWARD[activation], BACKWARD[activation]
    if len(pre) == 1:
        return derivative(d_hidden, pre[0]), None
    up, gate = pre
    return d_hidden * act(gate), derivative(d_hidden * up, gate)
