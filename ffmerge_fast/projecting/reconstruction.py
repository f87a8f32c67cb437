"""`Projector.reconstruct_`: the walk with its checks, and what it keeps so that a killed run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.passes import check_batches
from ..models.forward import evaluating, run, to_device, without_cache
from ..support.distributed import from_rank_zero, gather, is_sharded, world_size
from ..support.errors import FFMergeError
from ..support.resume import RunningSums
from ..support.sealed import DamagedError, read_sealed_tensors, write_sealed_tensors
from ..support.sizes import format_bytes
from ..support.tensors import check_finite
from .axes import ModelAxes
from .reconstruct import Reconstruction, ReconstructReport
from .selection import Selection
from .settings import Reconstructing

_FORMAT, _HEADER = 1, "ffmerge_reconstruction"
_PREFIX = "fitted/"  # of the names: the base's weights may be kept in the same folder under their own


@dataclass
class _Fitted:
    """A student's weights after some blocks; kept between runs."""

    tensors: dict[str, Tensor]
    blocks: int
    report: dict[str, Any]

    def save(self, path: Path, **done: Any) -> None:
        header = {"format": _FORMAT, "blocks": self.blocks, "report": self.report, "progress": done}
        tensors = {f"{_PREFIX}{name}": t.detach().cpu() for name, t in self.tensors.items()}
        write_sealed_tensors(path, tensors, header, _HEADER)

    @classmethod
    def load(cls, path: Path) -> tuple[_Fitted, dict[str, Any]]:
        try:
            tensors, header = read_sealed_tensors(path, _HEADER)
        except DamagedError as error:
            raise FFMergeError(
                f"reconstruct: {path} is damaged ({error}); begin anew with --fresh (fresh=True)"
            ) from error
        if header is None or header.get("format") != _FORMAT:
            raise FFMergeError(
                f"reconstruct: {path} is no file of fitted weights; begin anew with --fresh (fresh=True)"
            )
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
        return cls(tensors, header["blocks"], header["report"]), header["progress"]


@torch.no_grad()
def reconstruct_(
    origin: tuple[nn.Module, ModelAxes, Selection, Tensor],
    student: nn.Module,
    how: Reconstructing,
    batches: Iterable[Any],
    cache: RunningSums,
    spool_dir: str | Path | None = None,
    tell: Callable[[str], Any] | None = None,
) -> ReconstructReport:
    """Fit a student that `project` made; see `Projector.reconstruct_`.

    Args:
        origin: base, its axes, what is kept, Q.
        cache: what keeps the fitted weights.
        tell: told in a line, before the walk, what it will take.
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
            cache.save(_Fitted(parameters, count, vars(walk.report)))

    if tell is not None and held:
        tell(_expected(base, student, layout, held))
    walk = Reconstruction(base, student, layout, selection, basis, held, how, spool_dir, done, keep)
    walk.report.missed.update(report.missed)
    walk.report.trained.update(report.trained)
    found = walk.run()
    keep(blocks + 1)
    return found


def _expected(base: nn.Module, student: nn.Module, layout: ModelAxes, batches: Sequence[Any]) -> str:
    """Time and memory of the walk, by one pass of the first batch."""
    widths = layout.d_model + student.config.hidden_size
    with evaluating(base), without_cache(base):
        batch = to_device(batches[0], base)
        started = time.perf_counter()
        run(base, batch)
        seconds = (time.perf_counter() - started) * len(batches)
    given = batch.values() if isinstance(batch, dict) else [batch]
    tokens = max(value.shape[:2].numel() for value in given if isinstance(value, Tensor)) * len(batches)
    return (
        f"reconstruct: {len(batches)} batches, about {3 * seconds:.0f} s (three passes of the base), solves and local "
        f"training apart; "
        f"{format_bytes(8 * tokens * widths)} for the streams"
    )


def _agreed(done: int) -> int:
    """How many blocks are done on every rank; none where ranks differ."""
    counts = gather(done)
    return done if len(set(counts)) == 1 else 0


def _pairs(value: Any) -> Any:
    return {k: tuple(v) for k, v in value.items()} if isinstance(value, dict) else value
