"""Half-precision weights are trained as float32: steps below 2⁻⁹ of a bfloat16 weight would be rounded away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@contextlib.contextmanager
def float32_weights(model: nn.Module, dtypes: dict[str, torch.dtype]) -> Iterator[None]:
    """These parameters as float32 inside, rounded to their own dtypes afterwards.

    The parameters stay the same objects, so ties, optimisers and what FSDP2 made of them hold.

    Args:
        dtypes: as `half_weights` gives them.
    """
    _cast_(model, dict.fromkeys(dtypes, torch.float32))
    try:
        yield
    finally:
        _cast_(model, dtypes)


def half_weights(model: nn.Module) -> dict[str, torch.dtype]:
    """{name: dtype} of the trained parameters in half precision, and of frozen ones that must run in float32, too."""
    half = {name: p for name, p in model.named_parameters() if p.dtype in HALF}
    if not any(p.requires_grad for p in half.values()):
        return {}
    return {n: p.dtype for n, p in half.items() if p.requires_grad or _runs_wide(p.dtype, p.device)}


def autocast_of(dtypes: dict[str, torch.dtype], device: torch.device) -> str | None:
    """The precision of forward passes in which such weights ran before; float16 is for GPUs."""
    names = {HALF[dtype] for dtype in dtypes.values() if not _runs_wide(dtype, device)}
    return None if not names else "bf16" if "bf16" in names else "fp16"


def _runs_wide(dtype: torch.dtype, device: torch.device) -> bool:
    """Gradients in float16 need loss scaling, which is for GPUs."""
    return dtype == torch.float16 and device.type != "cuda"


def _cast_(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    wanted = {id(p): dtypes[name] for name, p in model.named_parameters() if name in dtypes}
    if wanted:  # by Module._apply, which FSDP2 follows
        model._apply(lambda tensor: tensor.to(wanted.get(id(tensor), tensor.dtype)))
