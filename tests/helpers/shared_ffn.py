"""Weights, the plain FFN, and gradients, for the tests of the shared FFN."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x) ** 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
POLICIES = ("none", "activation", "full")


def make(d, d_ff, gated, bias, dtype=torch.float32, seed=0):
    """Weights by their argument names."""
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype)  # noqa: E731
    weights = {"up": random(d_ff, d), "down": random(d, d_ff)}
    if gated:
        weights["gate"] = random(d_ff, d)
    if bias:
        weights |= {"up_bias": random(d_ff), "down_bias": random(d)}
        if gated:
            weights["gate_bias"] = random(d_ff)
    return weights


def plain(x, up, down, gate=None, up_bias=None, gate_bias=None, down_bias=None, activation="gelu"):
    act = ACTIVATIONS[activation]
    hidden = F.linear(x, up, up_bias)
    hidden = act(hidden) if gate is None else act(F.linear(x, gate, gate_bias)) * hidden
    return F.linear(hidden, down, down_bias)


def with_gradients(function, xs, weights, dtype=None, **options):
    """Outputs and gradients of all inputs and weights, of fresh copies in `dtype`; loss = Σ y · fixed noise."""
    xs = [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in xs]
    weights = {name: w.detach().to(dtype or w.dtype).clone().requires_grad_() for name, w in weights.items()}
    ys = function(xs, **weights, **options)
    g = torch.Generator().manual_seed(7)
    loss = sum((y * torch.randn(y.shape, generator=g).to(y.dtype)).sum() for y in ys)
    return [*ys, *torch.autograd.grad(loss, [*xs, *weights.values()])]


def plain_list(xs, **options):
    return [plain(x, **options) for x in xs]
