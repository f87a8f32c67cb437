"""What every Triton backend asks: whether it can run, how to launch, plain float32 products."""

from __future__ import annotations

import contextvars
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from ...support import env


def can_run(tensor: Tensor | None = None) -> str | None:
    """CUDA and ROCm tensors, or CPU tensors under TRITON_INTERPRET=1 (slow; for tests)."""
    interpreted = env.triton_interpreter()
    if tensor is not None and tensor.device.type != "cuda" and not interpreted:
        return f"the tensor is on {tensor.device}, want a GPU"
    reason = _why_no_triton()
    if reason or interpreted:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    device = torch.device("cuda") if tensor is None else tensor.device
    return _why_not_device(device)


@cache
def _why_no_triton() -> str | None:
    try:
        language = importlib.import_module("triton.language")
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install 'ffmerge_fast[gpu]'"
    if not hasattr(language, "make_tensor_descriptor"):
        return "this triton has no tensor descriptors: install triton 3.4 or newer"
    return None


@cache
def _why_not_device(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 tensor cores (compute capability 8.0)"
    return None


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def launch(kernel, grid: tuple[int, ...], device: torch.device, *arguments, describes: bool = False, **options) -> None:
    """Launch a kernel on `device`.

    describes: whether it makes tensor descriptors, whose memory then comes from torch, as CUDA graphs want it.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, device, *arguments, describes=describes, **options)
    if not describes or device.type != "cuda":
        kernel[grid](*arguments, **options)
        return

    def run():
        import triton

        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        kernel[grid](*arguments, **options)

    contextvars.copy_context().run(run)  # so that a caller's own allocator stays


@contextmanager
def no_tf32() -> Iterator[None]:
    """Plain float32 products, whichever of torch's two switches allows TF32."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch >= 2.9, set by the newer switch alone
        matmul, before = torch.backends.cuda.matmul, None
        precision, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before is None:
            matmul.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(before)
