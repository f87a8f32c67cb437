"""Shard merged models with FSDP2: shared modules first, then the blocks, then the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..support import distributed
from ..support.errors import FFMergeError


def shard_(model: nn.Module, **options: Any) -> nn.Module:
    """Shard a model in place over the process group with `fully_shard`, and return it.

    A module that several blocks share must be a unit of its own, made before the blocks: as part of one block it would
    be gathered and freed with that block while another still needs it.

    Args:
        model: its blocks are the entries of its outermost `nn.ModuleList`s.
        options: for every `torch.distributed.fsdp.fully_shard` (mesh, mp_policy, offload_policy, ...).

    Raises:
        FFMergeError: no process group is up, or the model has no `nn.ModuleList`.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise FFMergeError("fsdp2: no process group; call torch.distributed.init_process_group (torchrun) first")
    from torch.distributed.fsdp import fully_shard

    blocks = block_paths(model)
    if not blocks:
        raise FFMergeError(f"fsdp2: {type(model).__name__} has no nn.ModuleList of blocks; shard it by hand")
    for path in [*shared_paths(model, blocks), *blocks]:
        fully_shard(model.get_submodule(path), **options)
    return fully_shard(model, **options)


@torch.no_grad()
def copy_whole_(sharded: nn.Module, whole: nn.Module) -> nn.Module:
    """Give `whole`, the same model not sharded, the weights of a sharded one, for saving; every rank must call it."""
    targets = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        targets[name].copy_(distributed.whole(parameter))
    return whole


def block_paths(model: nn.Module) -> list[str]:
    """Paths of the entries of the model's outermost `nn.ModuleList`s."""
    lists: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
            lists.append(path)
    return [f"{path}.{i}" for path in lists for i in range(len(model.get_submodule(path)))]


def shared_paths(model: nn.Module, blocks: list[str]) -> list[str]:
    """First paths of the largest modules with parameters that lie in more than one block."""
    owners: dict[nn.Module, set[str]] = {}
    first: dict[nn.Module, str] = {}
    for block in blocks:
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            owners.setdefault(module, set()).add(block)
            first.setdefault(module, path)
    shared = [
        first[module]
        for module, where in owners.items()
        if len(where) > 1 and next(module.parameters(), None) is not None
    ]
    return [path for path in shared if not any(path.startswith(f"{outer}.") for outer in shared)]
