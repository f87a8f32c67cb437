"""A few steps of training one block of a student alone, on its own inputs, towards the teacher's stream behind it.

No matrix alone can follow what is not linear: a norm that stands in the stream, positions that the smaller class makes
itself. A block can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..support.distributed import from_rank_zero, on_all_ranks, sum_over_ranks
from ..support.errors import FFMergeError
from .side_by_side import SideBySide

_WARMUP = 0.05  # share of the steps


def train_block_(
    pair: SideBySide, stack: str, position: int, steps: int, lr: float, seed: int, left_alone: set[int]
) -> tuple[float, float]:
    """Train a block by AdamW, one batch of each rank a step; its old weights stay where they miss less.

    Minimised is ‖block(x') − Q x‖² over the tokens that count, with the student's own stream x' before the block and
    the teacher's x behind it. The last tenth of the batches is held out.

    Args:
        steps, lr: of AdamW without decay; a short rise of lr, then in a straight line to 0.
        seed: of the order of the batches.
        left_alone: ids of parameters that stay: layers share them.

    Returns:
        Share of the variance that is missed on the held-out batches, before and after.
    """
    block = pair.student.model.get_submodule(pair.student.blocks[stack][position])
    with _trainable(block, left_alone) as parameters:
        training = _BlockTraining(pair, stack, position, parameters)
        before = training.held_out()
        kept = [p.detach().clone() for p in parameters]
        training.train(steps, lr, seed)
        after = training.held_out()
        if not after < before:
            after = before
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.detach().copy_(value)
    return before, after


class _BlockTraining:
    """Gradients and errors of one block on the streams that are kept."""

    def __init__(self, pair: SideBySide, stack: str, position: int, parameters: list[nn.Parameter]):
        self._pair, self._stack, self._position, self._parameters = pair, stack, position, parameters
        count = len(pair.numbers)
        held = max(1, count // 10) if count > 1 else 0
        self._train = list(pair.numbers[: count - held])
        self._held = list(pair.numbers[count - held :]) or self._train
        self._variance = self._total_variance()

    def train(self, steps: int, lr: float, seed: int) -> None:
        optimizer = torch.optim.AdamW(self._parameters, lr=lr, weight_decay=0.0)
        generator, order = torch.Generator().manual_seed(seed), []
        for step in range(1, steps + 1):
            if not order and self._train:
                order = torch.randperm(len(self._train), generator=generator).tolist()
            rise = step / max(1.0, _WARMUP * steps)
            optimizer.param_groups[0]["lr"] = lr * min(1.0, rise, (steps - step + 1) / steps)
            self._set_gradients(self._train[order.pop()] if order else None)
            optimizer.step()

    @torch.no_grad()
    def held_out(self) -> float:
        """Mean error of the held-out tokens, as a share of the variance."""
        with on_all_ranks("reconstruct"):
            found = [torch.stack(self._error(number)) for number in self._held]
        error, count = sum_over_ranks([sum(found, self._pair.like.new_zeros(2)).double()])[0].tolist()
        return error / max(count, 1.0) / self._variance

    def _set_gradients(self, number: int | None) -> None:
        """Of the mean error of one batch of each rank."""
        gradients, count = [torch.zeros_like(p) for p in self._parameters], self._pair.like.new_zeros(())
        with on_all_ranks("reconstruct"), torch.enable_grad():
            if number is not None:
                error, count = self._error(number)
                found = torch.autograd.grad(error / self._variance, self._parameters, allow_unused=True)
                gradients = [zero if g is None else g for zero, g in zip(gradients, found, strict=True)]
        *gradients, count = sum_over_ranks([*gradients, count])
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient.div_(count.clamp(min=1))

    def _error(self, number: int) -> tuple[Tensor, Tensor]:
        """Squared error of one batch, and its number of tokens."""
        pair = self._pair
        target = pair.to_student(pair.kept.get("teacher", number).to(pair.like.device))
        like = next(iter(self._parameters))
        x = pair.kept.get("student", number).to(like.device)
        half = pair.student.model.dtype
        with torch.autocast(like.device.type, dtype=half, enabled=half in (torch.float16, torch.bfloat16)):
            y = pair.student.block(self._stack, self._position, number, x.to(like.dtype))
        error = (y.to(target.dtype) - target).square().sum(-1).flatten()
        mask = pair.student.mask(self._stack, number, len(error))
        error = error if mask is None else error[mask.to(error.device)]
        return error.sum(), error.new_tensor(float(len(error)))

    def _total_variance(self) -> float:
        """Mean ‖x − mean x‖² of the targets of all ranks."""
        pair, sums = self._pair, None
        with on_all_ranks("reconstruct"):
            for number in pair.numbers:
                x = pair.to_student(pair.kept.get("teacher", number).to(pair.like.device)).flatten(0, -2)
                mask = pair.student.mask(self._stack, number, len(x))
                x = (x if mask is None else x[mask.to(x.device)]).double()
                found = torch.cat([x.sum(0), x.square().sum()[None], x.new_tensor([float(len(x))])])
                sums = found if sums is None else sums + found
        if sums is None:
            sums = pair.like.new_zeros(len(pair.basis) + 2, dtype=torch.float64)
        total = sum_over_ranks([sums])[0]
        count = total[-1].clamp(min=1)
        variance = total[-2] / count - (total[:-2] / count).square().sum()
        if not variance.isfinite():
            path = pair.teacher.blocks[self._stack][self._position]
            raise FFMergeError(f"reconstruct: the teacher's stream after {path} is not finite")
        return from_rank_zero(float(variance.clamp(min=torch.finfo(torch.float32).tiny)))


@contextlib.contextmanager
def _trainable(block: nn.Module, left_alone: set[int]) -> Iterator[list[nn.Parameter]]:
    """The block's own parameters, in float32 at least and with gradients; rounded once at the end."""
    parameters = [p for p in block.parameters() if id(p) not in left_alone]
    dtypes, modes = [p.dtype for p in parameters], [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter, dtype, mode in zip(parameters, dtypes, modes, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(mode)
