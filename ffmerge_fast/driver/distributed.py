"""The few things a training loop asks of torch.distributed, with one process as the plain case."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._errors import FFMergeError

PARALLEL = (None, "ddp", "fsdp2")


def is_distributed() -> bool:
    """Whether a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def check_parallel(parallel: str | None) -> None:
    """Raise FFMergeError for a way of running in parallel that does not exist."""
    if parallel not in PARALLEL:
        raise FFMergeError(f"parallel: got {parallel!r}, wanted 'ddp', 'fsdp2' or None")


def parallelize(model: nn.Module, parallel: str | None) -> nn.Module:
    """The module to call in training: the model in DDP, the model sharded in place ("fsdp2"), or itself."""
    if not is_distributed() or parallel is None or isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    if parallel == "fsdp2":
        from ..integrations.fsdp2 import shard_

        return shard_(model)
    device = next(model.parameters()).device
    return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def reshard_(model: nn.Module) -> None:
    """Free what FSDP2 gathered for a forward pass that no backward pass follows."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks, in place."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def on_any_rank(flag: bool) -> bool:
    """Whether any rank says so; every rank gets the same answer."""
    if not is_distributed():
        return flag
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    return bool(sum_over_ranks(torch.tensor(int(flag), device=device)))


def gather_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every rank's tensors as "rank<i>/<name>"."""
    if not is_distributed():
        return {f"rank0/{name}": tensor for name, tensor in tensors.items()}
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, tensors)
    return {f"rank{i}/{name}": tensor for i, part in enumerate(everyone) for name, tensor in part.items()}


def from_rank_zero(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Skip the gradient exchange of one backward pass (all but the last of an accumulation)."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


def on_rank_zero(action: Any) -> None:
    """Run `action()` on rank 0; an FFMergeError there is raised on every rank."""
    error = None
    if rank() == 0:
        try:
            action()
        except FFMergeError as raised:
            error = raised
    message = from_rank_zero(str(error) if error else None)
    if message is not None:
        raise error or FFMergeError(message)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
