"""One call of a model: its mode, its device, its arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..support.errors import FFMergeError


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def to_device(batch: Any, model: nn.Module) -> Any:
    """The batch's tensors on the device of the model's first parameter."""
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        raise FFMergeError(f"batches: got a {type(batch).__name__}, wanted dicts, tuples or tensors")
    device = next(model.parameters()).device
    return _with_tensors(batch, lambda tensor: tensor.to(device))


def to_device_and_dtype(batch: Any, model: nn.Module) -> Any:
    """The batch's tensors on the model's device, floating-point ones in its dtype too; other objects as they are."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    return _with_tensors(batch, lambda tensor: tensor.to(like if tensor.is_floating_point() else like.device))


def _with_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    def changed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = change(value)
        keep = torch.is_inference_mode_enabled() or not value.is_inference()
        return value if keep else value.clone()  # which gradients can be taken of

    if isinstance(batch, Mapping):
        return {name: changed(value) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(map(changed, batch))
    return changed(batch)


def run(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)`, `model(*batch)` or `model(batch)`, as the batch is a dict, a tuple or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
