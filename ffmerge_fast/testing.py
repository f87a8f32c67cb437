"""Helpers to test ops and backends; for our tests and for those of other packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


def max_error(actual: Tensor, float64: Tensor) -> float:
    """Largest absolute difference from the float64 truth; NaN in `actual` counts as infinite."""
    if actual.shape != float64.shape:
        raise AssertionError(f"shape {list(actual.shape)}, want {list(float64.shape)}")
    if not actual.numel():
        return 0.0
    return (actual.detach().double() - float64.detach()).abs().nan_to_num(nan=torch.inf).max().item()


def assert_close_to_float64(kernel: Tensor, torch_same_dtype: Tensor, float64: Tensor, floor: float | None = None):
    """err(kernel, float64) <= 2 · err(plain torch in the same dtype, float64) + floor; no magic tolerances.

    Args:
        kernel: result under test.
        torch_same_dtype: the same computation in plain PyTorch, in the kernel's dtype.
        float64: the truth.
        floor: absolute; by default half a unit in the last place of the largest value, for the final rounding.
    """
    if kernel.dtype != torch_same_dtype.dtype:
        raise AssertionError(f"kernel is {kernel.dtype}, plain torch is {torch_same_dtype.dtype}")
    if floor is None:
        largest = float64.detach().abs().max().item() if float64.numel() else 0.0
        floor = torch.finfo(kernel.dtype).eps / 2 * largest
    error, plain = max_error(kernel, float64), max_error(torch_same_dtype, float64)
    if error > 2 * plain + floor:
        raise AssertionError(f"error {error:.3g} against float64; plain torch has {plain:.3g}, floor {floor:.3g}")


@contextmanager
def nan_poisoned_empty() -> Iterator[None]:
    """Fill what `torch.empty` and its kin return with NaN (or the largest integer): unwritten outputs show."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return wrapper

    targets = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
    patches = [mock.patch.object(owner, name, poisoned(getattr(owner, name))) for owner, name in targets]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@contextmanager
def no_recompile() -> Iterator[None]:
    """Make torch.compile raise instead of compiling a function again."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
