"""The weights of an FFN, whatever modules hold them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.common.activations import FORWARD
from ..support.errors import FFMergeError
from .projections import is_conv1d
from .sublayers import FFNSublayer


def ffn_parameters(model: nn.Module, ffn: FFNSublayer) -> list[Tensor]:
    """The parameters of an FFN's projections, each once: weights (as the modules hold them), then biases."""
    modules = [model.get_submodule(path) for path in ffn.projections.values()]
    return [m.weight for m in modules] + [m.bias for m in modules if m.bias is not None]


def op_arguments(model: nn.Module, ffn: FFNSublayer, replaced: dict[int, Tensor] | None = None) -> dict[str, Any]:
    """An FFN's weights as `ops.shared_ffn` takes them; views, through which gradients flow back.

    Args:
        replaced: {id(parameter): the tensor in its place}.
    """
    check_activation(ffn)

    def tensors(path: str | None) -> tuple[Tensor | None, Tensor | None]:
        if path is None:
            return None, None
        module = model.get_submodule(path)
        weight, bias = ((replaced or {}).get(id(p), p) for p in (module.weight, module.bias))
        return weight.T if is_conv1d(module) else weight, bias

    (up, up_bias), (gate, gate_bias), (down, down_bias) = map(tensors, (ffn.up_path, ffn.gate_path, ffn.down_path))
    if ffn.fused:
        gate, up = up.chunk(2)
        gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
    weights = {"up": up, "gate": gate, "down": down}
    return weights | {"up_bias": up_bias, "gate_bias": gate_bias, "down_bias": down_bias, "activation": ffn.activation}


def check_activation(ffn: FFNSublayer) -> None:
    """Raise FFMergeError unless the ops know the FFN's activation."""
    if ffn.activation not in FORWARD:
        raise FFMergeError(
            f"activation {ffn.activation!r} of {ffn.key} is not known, wanted one of {', '.join(FORWARD)}; name it in "
            "FFNSpec(activation=...)"
        )
