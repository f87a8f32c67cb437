"""Teacher and student side by side: both walked over the same batches, and the basis between their streams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..calibration.blocks import at_least_float32
from ..calibration.walk import Kept, Walk
from ..models.sublayers import FFNs


class SideBySide:
    """Two models of the same class and depth, and what is kept of their streams.

    Args:
        teacher, student: the models.
        ffns: the teacher's FFNs; the student's lie at the same paths.
        basis: Q [d', d], float64.
        batches: calibration data of this rank.
        spool_dir: folder for the streams; None: in host memory.

    Attributes:
        teacher, student: the walks.
        kept: "teacher" and "student": the streams before the next block, by batch; and what stages keep.
        numbers: of the batches.
        like: a tensor of the device and dtype that fits are made in.
        basis: Q as such a tensor.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        ffns: FFNs,
        basis: Tensor,
        batches: Sequence[Any],
        spool_dir: str | Path | None,
    ):
        self.kept = Kept(spool_dir)
        self.teacher, self.student = (Walk(model, ffns, batches, Kept(spool_dir)) for model in (teacher, student))
        self.numbers = range(len(batches))
        self.like = at_least_float32(next(student.parameters()).detach())
        self.basis = basis.to(self.like)

    @contextlib.contextmanager
    def walking(self) -> Iterator[None]:
        """Both models evaluated; in the end nothing is kept."""
        with contextlib.ExitStack() as context:
            for kept in (self.kept, self.teacher.kept, self.student.kept):
                context.enter_context(contextlib.closing(kept))
            context.enter_context(self.teacher)
            context.enter_context(self.student)
            yield

    def to_student(self, stream: Tensor) -> Tensor:
        """Q x for the teacher's stream x [.., d]."""
        return at_least_float32(stream).to(self.basis) @ self.basis.T
