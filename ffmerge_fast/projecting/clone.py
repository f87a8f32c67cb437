"""The clone loss: what a student's matrices give inside its blocks, beside what the teacher's give, in training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.blocks import at_least_float32
from ..calibration.padding import token_masks
from ..support.errors import FFMergeError
from .axes import ModelAxes
from .fits import kept_features
from .selection import Selection
from .stages import Linears


class CloneLoss:
    """Mean over a student's matrices of ‖y' − y‖² / ‖y‖², of the tokens that count; made by `Projector.clone_loss`.

    y' is what a matrix of the student gives. Where it reads the residual stream, y is what the teacher's gives, of the
    rows that are kept; where it writes it, Q times what the teacher's gives. Nothing is added to either model.

    Args:
        student, teacher: of the same class.
        layout, selection: the teacher's axes, and what the student keeps of them.
        basis: Q [d', d].
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, layout: ModelAxes, selection: Selection, basis: Tensor):
        linears = Linears(teacher, layout)
        self._teacher, self._stacks = teacher, layout.stacks()
        self._kept: dict[str, Callable[[Tensor], Tensor]] = {}  # of the teacher's outputs, by path
        seen: set[int] = set()  # a shared matrix is found under several paths, and hooked once
        for path in (p for ffn in layout.ffns for p in linears.inside(ffn.path)):
            module = student.get_submodule(path)
            if id(module) not in seen and (linears.reads(path) or linears.writes(path)):
                seen.add(id(module))
                self._kept[path] = partial(kept_features, linears.axes[path][0], selection, basis)
        self._given: dict[str, list[Tensor]] = {}
        self._wanted: dict[str, list[Tensor]] = {}

    @contextlib.contextmanager
    def recording(self, student: nn.Module) -> Iterator[None]:
        """Inside, one forward pass of the student and one of the teacher are listened to."""
        self._given, self._wanted = {path: [] for path in self._kept}, {path: [] for path in self._kept}
        handles = []
        for path, kept in self._kept.items():
            given, wanted = self._given[path], self._wanted[path]
            hook = student.get_submodule(path).register_forward_hook
            handles.append(hook(lambda _, args, y, given=given: given.append(y)))
            hook = self._teacher.get_submodule(path).register_forward_hook
            handles.append(
                hook(lambda _, args, y, wanted=wanted, kept=kept: wanted.append(kept(at_least_float32(y.detach()))))
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Of the two passes that were recorded, which were of this batch.

        Raises:
            FFMergeError: one of them did not run through the same modules as the other.
        """
        masks = [m.flatten().bool() for m in token_masks(batch, self._teacher, self._stacks).values()]
        terms = []
        for path, given in self._given.items():
            wanted = self._wanted[path]
            if len(given) != len(wanted) or not given:
                raise FFMergeError(
                    f"clone: {path} ran {len(given)} times in the student and {len(wanted)} times in the teacher; "
                    "train without gradient checkpointing, and with a teacher that is the projected base"
                )
            for y, target in zip(given, wanted, strict=True):
                y, target = at_least_float32(y).flatten(0, -2), target.flatten(0, -2).to(y.device)
                mask = next((m for m in masks if len(m) == len(y)), None)
                if mask is not None:
                    y, target = (x * mask.to(x)[:, None] for x in (y, target))
                terms.append((y - target).square().sum() / target.square().sum().clamp(min=_TINY))
        self._given, self._wanted = {}, {}
        return torch.stack([term.to(terms[0].device) for term in terms]).mean()


_TINY = torch.finfo(torch.float32).tiny
