"""Numbers of dtypes and activations as the C++ kernels take them."""

from __future__ import annotations

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


ACTIVATIONS = {name: i for i, name in enumerate((None, "relu", "gelu", "gelu_tanh", "silu", "relu2", "quick_gelu"))}
