"""The FFN activations, by the names that configs use, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...support.errors import FFMergeError

_aten = torch.ops.aten
_QUICK = 1.702


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(_QUICK * x)
    return grad * (s + _QUICK * x * s * (1 - s))


FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(_QUICK * x),
}

BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (grad of the output, input) -> grad of the input
    "relu": lambda g, x: _aten.threshold_backward(g, x, 0),
    "gelu": lambda g, x: _aten.gelu_backward(g, x),
    "gelu_tanh": lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"),
    "silu": _aten.silu_backward,
    "relu2": lambda g, x: g * 2 * F.relu(x),
    "quick_gelu": _quick_gelu_backward,
}


def check_activation(name: str | None, optional: bool = False) -> None:
    """Raise FFMergeError unless `name` is a known activation (or None, when `optional`)."""
    if name not in FORWARD and not (optional and name is None):
        raise FFMergeError(f"activation: got {name!r}, want one of {', '.join(FORWARD)}{' or None' * optional}")
