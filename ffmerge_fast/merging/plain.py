"""Layers whose shared weights stand beside something of their own, turned into layers of a stock model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.config_widths import d_ff_field
from ..models.projections import delta_parameters, is_conv1d, matrix, private_neurons, private_parameters
from ..models.sublayers import FFNs, FFNSublayer, set_module


def widths_of_plain(model: nn.Module, groups: Sequence[Sequence[FFNSublayer]]) -> dict[str, int]:
    """{config field: d_ff} that the stock model has once each layer's neurons are its own.

    Raises:
        FFMergeError: the config cannot say it.
    """
    neurons, config = private_neurons(model), getattr(model, "config", None)
    if not neurons or config is None:
        return {}
    return {d_ff_field(config, members[0].stack): members[0].d_ff + neurons for members in groups}


@torch.no_grad()
def make_plain_(model: nn.Module, ffns: FFNs, groups: Sequence[Sequence[FFNSublayer]]) -> None:
    """Give every layer of the groups nn.Linear or Conv1D of its own: W + A B, or W beside the layer's neurons.

    With private neurons all FFNs of the groups' stacks become as wide.
    """
    if neurons := private_neurons(model):
        stacks = {members[0].stack for members in groups}
        wider = [ffn for ffn in ffns if ffn.stack in stacks]
        made = {path: module for ffn in wider for path, module in _widened(model, ffn, neurons).items()}
    else:
        made = {path: _folded(model.get_submodule(path)) for g in groups for f in g for path in f.projections.values()}
    for path, module in made.items():
        set_module(model, path, module)


def _folded(projection: nn.Module) -> nn.Module:
    """With W + A B and b + c, multiplied out in float32 and rounded once."""
    a, b, c = delta_parameters(projection).values()
    wide = torch.promote_types(a.dtype, torch.float32)
    weight = matrix(projection) + a.to(wide) @ b.to(wide)
    return _plain(projection, weight, None if c is None else projection.bias + c.to(wide))


def _widened(model: nn.Module, ffn: FFNSublayer, neurons: int) -> dict[str, nn.Module]:
    """The projections of one FFN with its own neurons after the shared ones, or with neurons of zeros."""
    found = {}
    for name, path in ffn.projections.items():
        module, out = model.get_submodule(path), name == "down"
        halves = 2 if ffn.fused and name == "up" else 1
        weight, bias = matrix(module), module.bias
        shape = (len(weight), neurons) if out else (halves * neurons, weight.shape[1])
        zeros = {"weight": weight.new_zeros(shape), "bias": None if bias is None else bias.new_zeros(shape[0])}
        own = private_parameters(module) or zeros
        if out:
            weight = torch.cat([weight, own["weight"]], 1)
            bias = None if bias is None else bias + own["bias"]
        else:
            weight = _interleaved(weight, own["weight"], halves)
            bias = None if bias is None else _interleaved(bias, own["bias"], halves)
        found[path] = _plain(module, weight, bias)
    return found


def _interleaved(shared: Tensor, own: Tensor, halves: int) -> Tensor:
    """The rows of each half: the shared ones, then the layer's own."""
    pairs = zip(shared.chunk(halves), own.chunk(halves), strict=True)
    return torch.cat([part for pair in pairs for part in pair])


def _plain(like: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """An nn.Linear or Conv1D of these values [out, in] and [out], of the dtype, mode and needs of a projection."""
    with torch.device("meta"):
        if is_conv1d(like):
            from transformers.pytorch_utils import Conv1D

            made = Conv1D(*weight.shape)
        else:
            made = nn.Linear(*reversed(weight.shape), bias=bias is not None)
    values = {"weight": weight.T if is_conv1d(like) else weight, "bias": bias}
    for name, value in values.items():
        if value is not None:
            value = value.to(like.weight.dtype).contiguous()
            setattr(made, name, nn.Parameter(value, requires_grad=like.weight.requires_grad))
    return made.train(like.training)
