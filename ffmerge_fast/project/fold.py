"""Folding: what remains of a projected model is its student, a plain transformers model."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..support.distributed import is_sharded, whole


def fold(student: nn.Module) -> nn.Module:
    """A copy of the student in evaluation mode and without gradients; W, P and R are not part of it.

    A student that FSDP2 has sharded becomes a whole model of its own class; every rank must call this then.
    """
    if any(map(is_sharded, student.parameters())):
        return _gathered(student).eval()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad(set_to_none=True)  # so that they are not copied
    try:
        folded = copy.deepcopy(student)
    finally:
        for name, parameter in student.named_parameters():
            parameter.grad = gradients[name]
    return folded.eval()


@torch.no_grad()
def _gathered(student: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FSDPModule

    plain = next(cls for cls in type(student).__mro__ if not issubclass(cls, FSDPModule))
    with torch.random.fork_rng(devices=[]):
        gathered = plain(copy.deepcopy(student.config))
    first = next(student.parameters())
    gathered.to(device=first.device, dtype=first.dtype)
    gathered.generation_config = copy.deepcopy(getattr(student, "generation_config", None))
    for of in ("named_parameters", "named_buffers"):
        targets = dict(getattr(gathered, of)())
        for name, tensor in getattr(student, of)():
            targets[name].copy_(whole(tensor))
            targets[name].requires_grad_(tensor.requires_grad)
    return gathered
