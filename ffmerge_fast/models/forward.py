"""One call of a model: its mode, its device, its arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

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
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(v.to(device) if isinstance(v, Tensor) else v for v in batch)
    raise FFMergeError(f"batches: got a {type(batch).__name__}, wanted dicts, tuples or tensors")


def run(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)`, `model(*batch)` or `model(batch)`, as the batch is a dict, a tuple or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
