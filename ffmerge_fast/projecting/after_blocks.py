"""Reconstruction of what comes after the blocks: heads, poolers, classifiers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..calibration.least_squares import Regression
from ..calibration.walk import Walk, enough, watching
from ..models.projections import matrix
from ..support.distributed import gather, on_all_ranks
from .fits import Fits
from .side_by_side import SideBySide
from .stages import Event, Linears, Reading, norms_of, readings, trace


def fit_after_blocks(pair: SideBySide, fits: Fits, linears: Linears, last_norm: str | None) -> None:
    """Fit the matrices behind the blocks, and the gain before a head that is tied to the embeddings.

    Args:
        last_norm: of the stream, in the last block (post-norm).
    """
    with on_all_ranks("reconstruct"):
        events = _events(pair.teacher, linears) if pair.numbers else []
        plan = _plan(pair.student.model, events, linears, last_norm)
    for reading, tied, norm in next(filter(None, gather(plan)), []):
        if reading.paths:
            fits.absorb_gain(reading.paths, reading.norm)
            fits.readers(reading.paths, _moments(pair, reading.paths[0]))
        for head in tied if norm and fits.narrower else ():
            fits.gain_before(head, norm, _moments(pair, head))


def _plan(
    student: nn.Module, events: Sequence[Event], linears: Linears, last_norm: str | None
) -> list[tuple[Reading, list[str], str | None]]:
    """(matrices with one input, heads among them that are tied to the embeddings, the norm before those)"""
    table = getattr(student.get_input_embeddings(), "weight", None)
    found = []
    for reading in readings(events, linears):
        tied = [path for path in reading.paths if student.get_submodule(path).weight is table]
        own = tuple(path for path in reading.paths if path not in tied)
        norm = (_norm_before(tied[0], events, linears) or last_norm) if tied else None
        found.append((Reading(own, None if tied else reading.norm), tied, norm))
    return found


def _events(walk: Walk, linears: Linears) -> list[Event]:
    """What runs after the last block of the teacher, outside of all blocks, with its first batch."""
    blocks = [path for paths in walk.blocks.values() for path in paths]
    inside = tuple(f"{path}." for path in blocks)
    outside = [p for p in (*linears.axes, *norms_of(walk.model)) if p not in blocks and not p.startswith(inside)]
    events = trace(walk.model, [*outside, blocks[-1]], lambda: walk.after(0))
    last = max(i for i, event in enumerate(events) if event.path == blocks[-1])
    return events[last + 1 :]


def _norm_before(head: str, events: Sequence[Event], linears: Linears) -> str | None:
    """The norm that a head is given the output of, up to a factor (T5)."""
    z = next(event.x for event in events if event.path == head).float()
    for event in events:
        if event.path not in linears.axes and event.y.shape == z.shape:
            y = event.y.float()
            factor = (y * z).sum() / y.square().sum()
            if (factor * y - z).norm() <= 1e-2 * z.norm():
                return event.path
    return None


def _moments(pair: SideBySide, path: str) -> Regression:
    """Of the inputs of a module after the blocks: the student's, and the teacher's."""
    walks = pair.student, pair.teacher
    moments = Regression(*(matrix(walk.model.get_submodule(path)).shape[1] for walk in walks), pair.like)
    with on_all_ranks("reconstruct"):
        for number in pair.numbers:
            z, target = (_input(walk, path, number) for walk in walks)
            mask = pair.student.mask_of_rows(number, z.shape[:-1].numel())
            moments.push(z, target, mask, f"reconstruct: {path}")
    moments.all_reduce_()
    return moments


def _input(walk: Walk, path: str, number: int) -> Tensor:
    found: list[Tensor] = []

    def reached(z: Tensor) -> None:
        found.append(z)
        enough()

    with watching(walk.model, {path: reached}):
        walk.after(number)
    return found[0]
