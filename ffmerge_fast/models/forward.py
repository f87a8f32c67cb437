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


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache in forward passes inside: it is dead weight when nothing is generated."""
    config = getattr(unwrap(model), "config", None)
    if getattr(config, "use_cache", None) is not True:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def to_device(batch: Any, model: nn.Module) -> Any:
    """The batch's tensors on the device of the model's first parameter."""
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        raise FFMergeError(f"batches: got a {type(batch).__name__}, wanted dicts, tuples or tensors")
    _check_ids(batch, model)
    device = next(model.parameters()).device
    return _with_tensors(batch, lambda tensor: tensor.to(device))


def to_device_and_dtype(batch: Any, model: nn.Module) -> Any:
    """The batch's tensors on the model's device, floating-point ones in its dtype too; other objects as they are."""
    _check_ids(batch, model)
    like = next(p for p in model.parameters() if p.is_floating_point())
    return _with_tensors(batch, lambda tensor: tensor.to(like if tensor.is_floating_point() else like.device))


def _check_ids(batch: Any, model: nn.Module) -> None:
    """Raise FFMergeError for lists, and for tokens without an embedding, which on a GPU would end the process."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if isinstance(batch, Mapping) and isinstance(ids, list):
        raise FFMergeError("batches: got lists for input_ids, wanted tensors; tokenise with return_tensors='pt'")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.device.type != "cpu" or not ids.numel():
        return
    embeddings = None
    with contextlib.suppress(AttributeError, NotImplementedError):  # no model of transformers, or one without ids
        embeddings = model.get_input_embeddings().num_embeddings
    if embeddings is not None and not 0 <= (worst := int(ids.max() if ids.min() >= 0 else ids.min())) < embeddings:
        raise FFMergeError(
            f"input_ids: got token {worst}, wanted one of the model's {embeddings} (0 to {embeddings - 1}); give the "
            "tokenizer that belongs to the model"
        )


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
    """`model(**batch)`, `model(*batch)` or `model(batch)`, as the batch is a dict, a tuple or a tensor.

    Raises:
        FFMergeError: the model itself fails on it.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple) else model(batch)
    except (FFMergeError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FFMergeError(
            f"the model fails on a batch of {_described(batch)} ({type(error).__name__}: {reason}); see that "
            "model(**batch) runs, with the tokens and layers that the model has"
        ) from error


def _described(batch: Any) -> str:
    named = batch if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, tuple) else (batch,)))
    shapes = [f"{name} {list(value.shape)}" for name, value in named.items() if isinstance(value, Tensor)]
    return ", ".join(shapes) or "no tensors"
