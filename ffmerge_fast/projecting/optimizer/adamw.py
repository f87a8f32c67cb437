"""AdamW on one tensor at a time, its moments in float32 or in 8 bits.

The update is torch's fused one where the device has it. With 8-bit moments a tensor is updated piece by piece, so that
float32 moments of a piece are all that ever exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ...support.errors import FFMergeError
from ..settings import STATES
from .blockwise import dequantize, quantize, scale_count

MIN_8BIT = 4096  # smaller tensors, and vectors, keep float32 moments
_PIECE = {"cpu": 2**18, "cuda": 2**24}  # values: what stays in a CPU's cache, what fills a GPU
_FUSED = ("cpu", "cuda")
_MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))


@dataclass(frozen=True)
class AdamWOptions:
    """What `Projector.optimizer` is told about the update.

    Raises:
        FFMergeError: a value that AdamW cannot have.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    weight_decay_on_projections: float
    max_grad_norm: float | None
    state: str

    def __post_init__(self):
        for name in ("lr", "eps", "weight_decay", "weight_decay_on_projections"):
            if not getattr(self, name) >= 0:
                raise FFMergeError(f"{name}: got {getattr(self, name)}, wanted 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise FFMergeError(f"betas: got {self.betas}, wanted two numbers from 0 to below 1")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise FFMergeError(f"max_grad_norm: got {self.max_grad_norm}, wanted a number above 0, or None")
        if self.state not in STATES:
            raise FFMergeError(f"state: got {self.state!r}, wanted one of {', '.join(STATES)}")

    @property
    def settings(self) -> dict[str, Any]:
        """Those that decide the result beside lr, which a schedule sets; as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "lr"} | {"betas": list(self.betas)}


def new_moments(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, state: str) -> dict[str, Tensor]:
    """Moments of a tensor before its first step, by name: exp_avg, exp_avg_sq, step.

    With state "8bit" and a matrix of at least 4096 values the moments are codes (uint8, flat) and there are
    exp_avg_scale and exp_avg_sq_scale beside them; exp_avg_sq then holds square roots, which need half the decades.
    """
    numel = math.prod(shape)
    moments = {"step": torch.zeros((), dtype=torch.float32)}
    for name, signed in _MOMENTS:
        if state == "8bit" and sum(n > 1 for n in shape) > 1 and numel >= MIN_8BIT:
            moments[name], moments[f"{name}_scale"] = _zeros_8bit(numel, signed, device)
        else:
            moments[name] = torch.zeros(shape, dtype=dtype, device=device)
    return moments


def _zeros_8bit(numel: int, signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    zero = int(quantize(torch.zeros(1), signed)[0])
    codes = torch.full((numel,), zero, dtype=torch.uint8, device=device)
    return codes, torch.zeros(scale_count(numel), dtype=torch.float32, device=device)


def adamw_(
    value: Tensor,
    gradient: Tensor,
    moments: dict[str, Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of torch's AdamW, in place.

    Args:
        value: contiguous. gradient: of the same shape and dtype.
        moments: from `new_moments`; the step they count is advanced.
    """
    options = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    step, average, square = moments["step"], moments["exp_avg"], moments["exp_avg_sq"]
    gradient = gradient.contiguous()  # the fused kernels take the memory as it lies
    if "exp_avg_scale" not in moments:
        _step_(value, gradient, average, square, step, options)
    else:
        scales = moments["exp_avg_scale"], moments["exp_avg_sq_scale"]
        piece = _PIECE.get(value.device.type, 2**20)
        cut = [t.view(-1).split(piece) for t in (value, gradient, average, square)]
        cut += [scale.split(scale_count(piece)) for scale in scales]
        for part in zip(*cut, strict=True):
            _step_8bit_(*part, step, options)
    step += 1


def _step_8bit_(value, gradient, average, square, average_scale, square_scale, step, options) -> None:
    first = dequantize(average, average_scale, True, value.dtype)
    second = dequantize(square, square_scale, False, value.dtype).square_()
    _step_(value, gradient, first, second, step, options)
    for stored, scale, (codes, scales) in (
        (average, average_scale, quantize(first, signed=True)),
        (square, square_scale, quantize(second.sqrt_(), signed=False)),
    ):
        stored.copy_(codes)
        scale.copy_(scales)


def _step_(value: Tensor, gradient: Tensor, average: Tensor, square: Tensor, step: Tensor, options: dict) -> None:
    fused = value.device.type in _FUSED
    counter = torch.full((), float(step), device=value.device if fused else "cpu")
    adamw(
        [value], [gradient], [average], [square], [], [counter], fused=fused, foreach=False, amsgrad=False,
        maximize=False, **options,
    )  # fmt: skip
