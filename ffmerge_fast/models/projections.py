"""Projections: nn.Linear or Conv1D, plain or with a low-rank delta; which way a weight lies."""

from __future__ import annotations

from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether the weight is stored `[in, out]` (transformers' Conv1D) instead of nn.Linear's `[out, in]`."""
    name = type(module).__name__
    return hasattr(module, "nf") if name == "Conv1D" else name.endswith("DeltaLinear") and module.transposed


def delta_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A [out, rank], B [rank, in] and c [out] or None of one layer's projection with a low-rank delta; else {}."""
    own = module._parameters
    return {n: own.get(f"delta_{n}") for n in ("a", "b", "bias")} if own.get("delta_a") is not None else {}


def weight_owner(projection: nn.Module) -> nn.Module:
    """The module that holds a projection's weight: itself, or with a delta the first layer's."""
    return getattr(projection, "shared", projection) if delta_parameters(projection) else projection


def deltas_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all low-rank deltas in a model."""
    return [p for module in model.modules() for p in delta_parameters(module).values() if p is not None]


def delta_rank(model: nn.Module) -> int:
    """Rank of the low-rank deltas in a model; 0: it has none."""
    return next((d["a"].shape[1] for module in model.modules() if (d := delta_parameters(module))), 0)


def out_dim(module: nn.Module) -> int:
    """Axis of the weight that runs over output features."""
    return 1 if is_conv1d(module) else 0


def out_features(module: nn.Module) -> int:
    return module.weight.shape[out_dim(module)]


def matrix(module: nn.Module) -> Tensor:
    """The weight as [out, in], a view without gradients."""
    weight = module.weight.detach()
    return weight.T if is_conv1d(module) else weight


def in_features(module: nn.Module) -> int:
    return module.weight.shape[1 - out_dim(module)]
