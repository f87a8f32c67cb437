"""What tensors hold: finite values, memory of their own, values that may be trained later."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .errors import FFMergeError
from .tensor_files import is_plain

P, R = ParamSpec("P"), TypeVar("R")
DAMAGED = "load the checkpoint it came from again, or one before its training diverged"  # what to do about NaN weights


def check_finite(argument: str, tensors: Iterable[tuple[str, Tensor]], remedy: str) -> None:
    """Raise FFMergeError that names the first tensor with NaN or Inf; those that are not in memory are passed over."""
    extremes = [
        (name, t, torch.stack(t.detach().aminmax()))  # of a tensor with NaN both are NaN
        for name, t in tensors
        if is_plain(t) and not t.is_meta and t.numel()
    ]
    for name, tensor, both in extremes:
        if both.isfinite().all():
            continue
        wrong = tensor.numel() - int(tensor.detach().isfinite().sum())
        raise FFMergeError(
            f"{argument}: got NaN or Inf in {name} ({wrong:,} of {tensor.numel():,} values), wanted finite values; "
            f"{remedy}"
        )


def check_weights(model: nn.Module) -> None:
    """Raise FFMergeError that names the first parameter of the model with NaN or Inf."""
    check_finite("model", model.named_parameters(), DAMAGED)


def is_usable(score: float, what: str) -> bool:
    """Whether a score is finite; a warning says what it is of where it is not."""
    if not math.isfinite(score):
        warnings.warn(f"{what} is {score}: it is not chosen", stacklevel=3)
    return math.isfinite(score)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one memory, from its start, and are of one size: views of what a module gave."""
    return a is b or (a.numel() == b.numel() > 0 and a.data_ptr() == b.data_ptr())


def has_memory(tensor: Tensor) -> bool:
    """Whether its values lie where `data_ptr` says; not those of quantised and sharded tensors, which wrap others."""
    if type(tensor) in (Tensor, nn.Parameter) or not tensor.numel() or tensor.is_meta:
        return True
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.data_ptr() != 0


def check_memory(name: str, *tensors: Tensor | None) -> None:
    """Raise FFMergeError unless the tensors of an argument have memory that a kernel can read."""
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and not has_memory(tensor):
            raise FFMergeError(
                f"{name}: got a {type(tensor).__name__}, which is sharded or quantised and has no memory of its own; "
                "wanted a plain tensor: give its full_tensor(), its dequantize() or its local part"
            )


def not_inference(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function work inside torch.inference_mode as under no_grad: what it makes can be changed later."""

    @wraps(function)
    def under_no_grad(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return under_no_grad
