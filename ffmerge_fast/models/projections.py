"""Projections: nn.Linear or Conv1D, plain, or shared beside something of the layer's own; which way a weight lies."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

_SHARED = ("DeltaLinear", "PrivateLinear")  # and with "Tied" before: how the classes' names end


def is_conv1d(module: nn.Module) -> bool:
    """Whether the weight is stored `[in, out]` (transformers' Conv1D) instead of nn.Linear's `[out, in]`."""
    name = type(module).__name__
    return hasattr(module, "nf") if name == "Conv1D" else name.endswith(_SHARED) and module.transposed


def delta_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A [out, rank], B [rank, in] and c [out] or None of one layer's projection with a low-rank delta; else {}."""
    own = module._parameters
    return {n: own.get(f"delta_{n}") for n in ("a", "b", "bias")} if own.get("delta_a") is not None else {}


def private_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weight and bias (or None) of the neurons that one layer's projection has beside the shared ones; else {}.

    Into the neurons [halves · neurons, in] and [halves · neurons], out of them [out, neurons] and [out].
    """
    own = module._parameters
    return {n: own.get(f"private_{n}") for n in ("weight", "bias")} if own.get("private_weight") is not None else {}


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What one layer's projection has beside a shared weight: its delta, or its neurons."""
    return [p for p in (delta_parameters(module) | private_parameters(module)).values() if p is not None]


def weight_owner(projection: nn.Module) -> nn.Module:
    """The module that holds a projection's weight: itself, or where the layer shares it the first layer's."""
    return getattr(projection, "shared", projection) if own_parameters(projection) else projection


def own_parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all low-rank deltas and private neurons in a model."""
    return [p for module in model.modules() for p in own_parameters(module)]


def delta_rank(model: nn.Module) -> int:
    """Rank of the low-rank deltas in a model; 0: it has none."""
    return next((d["a"].shape[1] for module in model.modules() if (d := delta_parameters(module))), 0)


def private_neurons(model: nn.Module) -> int:
    """How many neurons each layer of a model's merged groups has for itself."""
    found = ((private_parameters(module), module) for module in model.modules())
    return next((own["weight"].shape[1] for own, module in found if own and module.out), 0)


def own_capacity(model: nn.Module) -> dict[str, int]:
    """What layers have beside a shared FFN: {}, {"delta_rank": r} or {"private_neurons": k}."""
    found = {"delta_rank": delta_rank(model), "private_neurons": private_neurons(model)}
    return {name: size for name, size in found.items() if size}


def describe_own(own: Mapping[str, int]) -> str:
    """What `own_capacity` found, in words."""
    return " and ".join(
        f"deltas of rank {size}" if name == "delta_rank" else f"{size} neurons of its own for each layer"
        for name, size in own.items()
    )


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
