"""The few things a training loop asks of torch.distributed, with one process as the plain case."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from ...support.distributed import is_distributed


def parallelize(model: nn.Module, parallel: str | None) -> nn.Module:
    """The module to call in training: the model in DDP, the model sharded in place ("fsdp2"), or itself."""
    if not is_distributed() or parallel is None or isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    if parallel == "fsdp2":
        from ...integrations.fsdp2 import shard_

        return shard_(model)
    device = next(model.parameters()).device
    return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def reshard_(model: nn.Module) -> None:
    """Free what FSDP2 gathered for a forward pass that no backward pass follows."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Skip the gradient exchange of one backward pass (all but the last of an accumulation)."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
