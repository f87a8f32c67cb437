"""`Projector.reconstruct_`: the walk with its checks, and what it keeps so that a killed run goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.passes import check_batches
from ..support.distributed import from_rank_zero, gather, is_sharded, whole, world_size
from ..support.errors import FFMergeError
from ..support.resume import RunningSums
from ..support.sealed import DamagedError, read_sealed_tensors, write_sealed_tensors
from ..support.tensors import check_finite
from .axes import ModelAxes
from .reconstruct import Reconstructing, Reconstruction, ReconstructReport
from .selection import Selection

_FORMAT, _HEADER = 1, "ffmerge_reconstruction"


@dataclass
class _Fitted:
    """A student's weights after some blocks; kept between runs."""

    tensors: dict[str, Tensor]
    blocks: int
    report: dict[str, Any]

    def save(self, path: Path, **done: Any) -> None:
        header = {"format": _FORMAT, "blocks": self.blocks, "report": self.report, "progress": done}
        write_sealed_tensors(path, {n: whole(t.detach()).cpu() for n, t in self.tensors.items()}, header, _HEADER)

    @classmethod
    def load(cls, path: Path) -> tuple[_Fitted, dict[str, Any]]:
        try:
            tensors, header = read_sealed_tensors(path, _HEADER)
        except DamagedError as error:
            raise FFMergeError(f"reconstruct: {path} is damaged ({error}); begin anew with --fresh (fresh=True)") from error
        if header is None or header.get("format") != _FORMAT:
            raise FFMergeError(f"reconstruct: {path} is no file of fitted weights; begin anew with --fresh (fresh=True)")
        return cls(tensors, header["blocks"], header["report"]), header["progress"]


def check_numbers(ridge: float, local_steps: int | None, local_lr: float) -> None:
    """Raise FFMergeError for numbers that `reconstruct_` cannot use."""
    if not 0 <= ridge < math.inf:
        raise FFMergeError(f"ridge: got {ridge}, wanted 0 or more (1e-2 is usual)")
    if local_steps is not None and (not isinstance(local_steps, int) or local_steps < 0):
        raise FFMergeError(f"local_steps: got {local_steps!r}, wanted 0 or more, or None")
    if not 0 < local_lr < math.inf:
        raise FFMergeError(f"local_lr: got {local_lr}, wanted a positive number (1e-3 is usual)")


@torch.no_grad()
def reconstruct_(
    origin: tuple[nn.Module, ModelAxes, Selection, Tensor],
    student: nn.Module,
    how: Reconstructing,
    batches: Iterable[Any],
    cache: RunningSums,
    spool_dir: str | Path | None = None,
) -> ReconstructReport:
    """Fit a student that `project` made; see `Projector.reconstruct_`.

    Args:
        origin: base, its axes, what is kept, Q.
        cache: what keeps the fitted weights.
    """
    base, layout, selection, basis = origin
    check_batches(batches)
    if any(map(is_sharded, student.parameters())):
        raise FFMergeError("reconstruct: the student is sharded; call reconstruct_ before fully_shard")
    check_finite("model", base.named_parameters(), "load the checkpoint it came from again")
    kept, _ = cache.resume(_Fitted.load, lambda fitted: {})
    held = list(cache.watched(batches))
    if not held and world_size() == 1:
        raise FFMergeError("reconstruct: no calibration data: `batches` is empty")
    report, parameters = ReconstructReport(), dict(student.named_parameters())
    done = _agreed(kept.blocks if kept else 0)
    blocks = len(layout.ffns)
    if done:
        for name, parameter in parameters.items():
            parameter.copy_(kept.tensors[name])
        report = ReconstructReport(**{k: _pairs(v) for k, v in kept.report.items()})
        if done > blocks:
            return report

    def keep(count: int) -> None:
        if cache.path is not None and (from_rank_zero(cache.due()) or count > blocks):
            cache.save(_Fitted(parameters, count, vars(run.report)))

    run = Reconstruction(base, student, layout, selection, basis, held, how, spool_dir, done, keep)
    run.report.missed.update(report.missed)
    run.report.trained.update(report.trained)
    found = run.run()
    keep(blocks + 1)
    return found


def _agreed(done: int) -> int:
    """How many blocks are done on every rank; none where ranks differ."""
    counts = gather(done)
    return done if len(set(counts)) == 1 else 0


def _pairs(value: Any) -> Any:
    return {k: tuple(v) for k, v in value.items()} if isinstance(value, dict) else value
