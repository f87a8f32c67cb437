"""Models that other libraries have wrapped, or put adapters into: what to pass instead."""

from __future__ import annotations

from torch import nn

from ..support.errors import FFMergeError

_INSIDE = {  # where wrappers of torch keep the model
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
}
_REMEDY = "merge its adapters (merge_and_unload()) or take them off (unload()) and give the model that this returns"


def refuse_wrapper(model: nn.Module) -> None:
    """Raise FFMergeError for a PeftModel, and for what DDP, FSDP1 or torch.compile returned."""
    name, room = type(model).__name__, type(model).__module__.partition(".")[0]
    if room == "peft":
        raise FFMergeError(f"model: got a {name}, wanted the model inside: {_REMEDY}")
    if room == "torch" and name in _INSIDE:
        raise FFMergeError(f"model: got a {name}, wanted the model inside: give model.{_INSIDE[name]}")


def refuse_adapters(model: nn.Module) -> None:
    """Raise FFMergeError for a PeftModel and for a model with adapters of peft in it."""
    refuse_wrapper(model)
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise FFMergeError(f"model: {path} is an adapter of peft ({type(module).__name__}): {_REMEDY}")
