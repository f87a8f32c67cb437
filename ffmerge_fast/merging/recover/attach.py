"""Layers that share the weights of an FFN, each with something of its own: low-rank deltas, or neurons."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...models.projections import delta_parameters, is_conv1d, private_parameters
from ...models.sublayers import FFNSublayer, set_module
from ...models.ties import config_section
from ...support.env import require
from ...support.errors import FFMergeError

Own = Mapping[str, Sequence[Tensor | None]]  # of one layer, by projection: the values of its own parameters


def check_own(model: nn.Module, groups: Sequence[Sequence[FFNSublayer]], option: str, size: int, axes: str) -> None:
    """Raise FFMergeError unless the groups' layers can get deltas or neurons of their own.

    Args:
        option: the argument that asks for them.
        size: how many; 0: none.
        axes: what limits it: "d_model, d_ff" or "d_ff".
    """
    for first in (members[0] for members in groups):
        if size and isinstance(model.get_submodule(first.path), nn.TransformerEncoderLayer):
            raise FFMergeError(
                f"{option}: {first.path} is a torch.nn.TransformerEncoderLayer, whose fast path reads the weights of "
                f"its projections and would leave out what a layer has of its own; use {option}=0"
            )
        most = min(getattr(first, axis) for axis in axes.split(", "))
        if not isinstance(size, int) or not 0 <= size <= most:
            raise FFMergeError(f"{option}: got {size}, wanted 0 (none) to {most}, the width of {first.key}")
        for path in first.projections.values() if size else ():
            module = model.get_submodule(path)
            plain = type(module) is nn.Linear or is_conv1d(module)
            if not plain or type(module.weight) not in (nn.Parameter, Tensor):
                raise FFMergeError(
                    f"{option}: {path} is a {type(module).__name__} of {type(module.weight).__name__}, wanted a "
                    "plain nn.Linear or Conv1D: recover before quantising or wrapping the model"
                )
    if size:
        require("transformers", extra="hf")


@torch.no_grad()
def attach_(
    model: nn.Module, groups: Sequence[Sequence[FFNSublayer]], kind: Mapping[str, int], values: Mapping[str, Own]
) -> None:
    """Give every layer of the merged groups modules of its own around the weights that they go on sharing.

    Args:
        kind: {"delta_rank": r} or {"private_neurons": k}.
        values: {FFN key: Own}.
    """
    from ...remote_code import modeling_ffmerge

    adopted = bool(getattr(getattr(model, "config", None), "ffmerge", None))
    section = config_section(model, groups, kind) if adopted else {}
    if adopted:
        modeling_ffmerge.release_(model)
    for members in groups:
        _separate_(model, members)
        for name in members[0].projections if not adopted else ():
            _add_(model, members, name, kind)
    if adopted:
        modeling_ffmerge.adopt_(model, section)
    for member in (f for members in groups for f in members):
        for name, path in member.projections.items():
            module = model.get_submodule(path)
            new = (delta_parameters(module) | private_parameters(module)).values()
            for parameter, value in zip(new, values[member.key][name], strict=True):
                if parameter is not None:
                    parameter.copy_(value)


def _add_(model: nn.Module, members: Sequence[FFNSublayer], name: str, kind: Mapping[str, int]) -> None:
    from ...remote_code import modeling_ffmerge

    paths = [f.projections[name] for f in members]
    if rank := kind.get("delta_rank"):
        modeling_ffmerge.add_deltas_(model, paths, rank)
    else:
        halves = 2 if members[0].fused and name == "up" else 1
        modeling_ffmerge.add_private_(model, paths, kind["private_neurons"], halves, name == "down")


def _separate_(model: nn.Module, members: Sequence[FFNSublayer]) -> None:
    """Give each layer its own FFN module around the projections that they share."""
    projections = [model.get_submodule(path) for path in members[0].projections.values()]
    for path in (path for f in members[1:] for path in f.shared):
        module = model.get_submodule(path)
        set_module(model, path, copy.deepcopy(module, {id(p): p for p in projections}))
