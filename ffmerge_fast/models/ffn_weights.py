"""The weights of an FFN, whatever modules hold them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..ops.common.activations import FORWARD
from ..ops.shared_ffn.weights import FFNWeights
from ..support.errors import FFMergeError
from .elsewhere import in_memory, values_elsewhere
from .projections import is_conv1d, private_parameters
from .sublayers import FFNSublayer


def ffn_weights(model: nn.Module, ffn: FFNSublayer, replaced: Mapping[int, Tensor] | None = None) -> FFNWeights:
    """An FFN's weights: the parameters themselves, or views of them, through which gradients flow back; of a model
    whose weights are elsewhere, their values.

    Args:
        replaced: {id(parameter): the tensor in its place}.
    """
    gate = model.get_submodule(ffn.gate_path) if ffn.gate_path else None
    up, down = (model.get_submodule(path) for path in (ffn.up_path, ffn.down_path))
    if not in_memory(model):
        replaced = {**values_elsewhere(model, [up, gate, down]), **(replaced or {})}
    return weights_of(up, gate, down, ffn.fused, replaced)


def private_weights(model: nn.Module, ffn: FFNSublayer, replaced: Mapping[int, Tensor] | None = None) -> FFNWeights:
    """An FFN of the neurons that a layer has beside the shared ones, with its own b_down."""

    def own(path: str | None) -> tuple[Tensor | None, Tensor | None]:
        found = private_parameters(model.get_submodule(path)).values() if path else (None, None)
        return tuple(p if p is None else (replaced or {}).get(id(p), p) for p in found)

    (up, up_bias), (gate, gate_bias), (down, down_bias) = map(own, (ffn.up_path, ffn.gate_path, ffn.down_path))
    if ffn.fused:
        gate, up = up.chunk(2)
        gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
    return FFNWeights(up, gate, down, up_bias, gate_bias, down_bias)


def weights_of(
    up: nn.Module,
    gate: nn.Module | None,
    down: nn.Module,
    fused: bool = False,
    replaced: Mapping[int, Tensor] | None = None,
) -> FFNWeights:
    """The same of its projections, nn.Linear or Conv1D; `fused`: `up` holds gate and up, gate first."""
    up_weight, up_bias = _projection(up, replaced)
    down_weight, down_bias = _projection(down, replaced)
    gate_weight, gate_bias = (None, None) if gate is None else _projection(gate, replaced)
    if fused:
        gate_weight, up_weight = up_weight.chunk(2)
        gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
    return FFNWeights(up_weight, gate_weight, down_weight, up_bias, gate_bias, down_bias)


def ffn_parameters(model: nn.Module, ffn: FFNSublayer) -> list[Tensor]:
    """The parameters of an FFN's projections, each once: weights (as the modules hold them), then biases."""
    modules = [model.get_submodule(path) for path in ffn.projections.values()]
    return [m.weight for m in modules] + [m.bias for m in modules if m.bias is not None]


def check_activation(ffn: FFNSublayer) -> None:
    """Raise FFMergeError unless the ops know the FFN's activation."""
    if ffn.activation not in FORWARD:
        raise FFMergeError(
            f"activation {ffn.activation!r} of {ffn.key} is not known, wanted one of {', '.join(FORWARD)}; name it in "
            "FFNSpec(activation=...)"
        )


def _projection(module: nn.Module, replaced: Mapping[int, Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias."""
    weight, bias = module.weight, module.bias
    if replaced:
        weight, bias = replaced.get(id(weight), weight), replaced.get(id(bias), bias)
    return weight.T if is_conv1d(module) else weight, bias
