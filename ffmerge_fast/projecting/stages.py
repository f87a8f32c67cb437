"""In which order the matrices of a block can be fitted, and what each is to give: read from one pass of the block.

A block adds what its sublayers write to the residual stream, and either that is all (pre-norm, sublayers one after the
other or side by side), or the sum is normalised each time (post-norm). Both show in the numbers of one pass; a block
that does something else (a norm inside the residual branch, a scaled branch) has no target and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.walk import stream_of, watching
from ..models.projections import is_conv1d
from ..models.sublayers import get
from ..support.errors import FFMergeError
from ..support.tensors import same_values
from .axes import MODEL, Axis, ModelAxes


@dataclass(frozen=True)
class Reading:
    """Matrices that are given the same input, which is the residual stream, normed or not.

    Attributes:
        paths: their modules, in order of execution.
        norm: path of the norm that gives them their input, where nothing else takes it.
        foreign: whether it is another stack's stream (the keys and values of cross-attention).
    """

    paths: tuple[str, ...]
    norm: str | None = None
    foreign: bool = False


@dataclass(frozen=True)
class Writing:
    """A matrix whose output is added to the stream."""

    path: str


@dataclass(frozen=True)
class Norming:
    """A norm of the stream itself, after a sum (post-norm)."""

    path: str


Stage = Reading | Writing | Norming


def moved(stage: Stage, old: str, new: str) -> Stage:
    """The same stage of another block, by the blocks' paths."""
    if not isinstance(stage, Reading):
        return type(stage)(new + stage.path.removeprefix(old))
    paths = tuple(new + path.removeprefix(old) for path in stage.paths)
    return Reading(paths, stage.norm and new + stage.norm.removeprefix(old), stage.foreign)


@dataclass(frozen=True)
class Event:
    """A module that ran."""

    path: str
    x: Tensor
    y: Tensor


class Linears:
    """The linear modules of a model along the residual stream, by path: which read it, which write it.

    A matrix from the stream to the stream (a pooler) reads it. Tables of embeddings are neither.
    """

    def __init__(self, model: nn.Module, layout: ModelAxes):
        self.axes: dict[str, tuple[Axis | None, Axis | None]] = {}  # of rows and columns, as [out, in]
        for name, axes in layout.axes.items():
            path = name.removesuffix(".weight")
            module = get(model, path) if path != name else None
            if module is not None and len(axes) == 2 and not isinstance(module, nn.Embedding):
                self.axes[path] = axes[::-1] if is_conv1d(module) else axes

    def reads(self, path: str) -> bool:
        columns = self.axes[path][1]
        return columns is not None and columns.role == MODEL

    def writes(self, path: str) -> bool:
        rows = self.axes[path][0]
        return rows is not None and rows.role == MODEL and not self.reads(path)

    def inside(self, prefix: str) -> list[str]:
        """Paths of those of one module."""
        return [path for path in self.axes if path.startswith(f"{prefix}.")]


def norms_of(model: nn.Module, prefix: str = "") -> list[str]:
    """Paths of the norms inside a module."""
    return [
        path for path, module in model.named_modules(remove_duplicate=False)
        if "norm" in type(module).__name__.lower() and path.startswith(f"{prefix}." if prefix else "")
    ]  # fmt: skip


def trace(model: nn.Module, paths: Sequence[str], run: Callable[[], Any]) -> list[Event]:
    """What goes into and comes out of modules, in the order in which they end."""
    events: list[Event] = []
    inputs: dict[str, Tensor] = {}

    def end(path: str, output: Any) -> None:
        output = stream_of(output)
        if isinstance(output, Tensor) and isinstance(inputs.get(path), Tensor):
            events.append(Event(path, inputs.pop(path), output))

    begin = {path: (lambda x, path=path: inputs.update({path: x})) for path in paths}
    with watching(model, begin, {path: (lambda output, path=path: end(path, output)) for path in paths}):
        run()
    return events


def block_stages(path: str, kind: str, events: Sequence[Event], linears: Linears, streams: Mapping[str, Any]) -> list:
    """The stages of a block.

    Args:
        path, kind: of the block, for the error.
        events: of its linear modules and norms.
        streams: "in" and "out": the block's; "foreign": other tensors that it was given.

    Raises:
        FFMergeError: it has no known form; a module ran twice; NaN or Inf.
    """
    x, out = streams["in"], streams["out"]
    if not out.isfinite().all():
        raise FFMergeError(f"reconstruct: the first batch gives values in {path} that are not finite; check the data")
    named = [e.path for e in events if e.path in linears.axes]
    if twice := next((p for p in named if named.count(p) > 1), None):
        raise FFMergeError(f"reconstruct: {twice} runs twice in {path}, so it has no target of its own; {_LEAVE}")
    writers = [e for e in events if e.path in linears.axes and linears.writes(e.path)]
    readers = readings(events, linears, streams["foreign"])
    if writers and close(sum(_like(e.y, x) for e in writers), out - x, out):
        return _in_order(events, [*readers, *(Writing(e.path) for e in writers)])
    norms = _norms_of_sums(x, events, writers)
    if norms and norms[-1] is not None and close(_like(norms[-1].y, out), out, out):
        own = [Reading(r.paths, None, r.foreign) for r in readers]  # the stream itself is what they read
        return _in_order(events, [*own, *(Writing(e.path) for e in writers), *(Norming(e.path) for e in norms)])
    raise no_target(path, kind)


def no_target(path: str, kind: str) -> FFMergeError:
    """The error for a block of no known form."""
    return FFMergeError(
        f"reconstruct: the block {path} ({kind}) neither adds its sublayers' outputs to the residual stream nor "
        f"normalises their sums, so its matrices have no target; {_LEAVE}"
    )


def readings(events: Sequence[Event], linears: Linears, foreign: Sequence[Tensor] = ()) -> list[Reading]:
    """The matrices that read a stream, those with the same input together."""
    groups: list[list[Event]] = []
    for event in (e for e in events if e.path in linears.axes and linears.reads(e.path)):
        group = next((g for g in groups if same_values(g[0].x, event.x)), None)
        groups.append([event]) if group is None else group.append(event)
    found = []
    for group in groups:
        norm = next((e.path for e in events if e.path not in linears.axes and same_values(e.y, group[0].x)), None)
        alien = any(same_values(t, group[0].x) for t in foreign)
        found.append(Reading(tuple(e.path for e in group), None if alien else norm, alien))
    return found


_LEAVE = "leave reconstruction out (--no-reconstruct)"


def _in_order(events: Sequence[Event], stages: Sequence[Stage]) -> list[Stage]:
    """Stages by when the first of their modules ran."""
    when = {event.path: i for i, event in reversed([*enumerate(events)])}
    return sorted(stages, key=lambda s: when[s.paths[0] if isinstance(s, Reading) else s.path])


def _norms_of_sums(x: Tensor, events: Sequence[Event], writers: Sequence[Event]) -> list[Event | None]:
    """Of every writer, the norm that is given the sum of its output and the stream before it."""
    found: list[Event | None] = []
    for writer in writers:
        wanted = x + _like(writer.y, x)
        of_size = (e for e in events if e.path not in [w.path for w in writers] and e.x.numel() == x.numel())
        norm = next((e for e in of_size if close(_like(e.x, x), wanted, wanted)), None)
        found.append(norm)
        if norm is None:
            break
        x = _like(norm.y, x)
    return found


def _like(y: Tensor, x: Tensor) -> Tensor:
    return y.reshape(x.shape)


def close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Whether a is b up to what rounding leaves of sums of the size of `scale`."""
    eps = torch.finfo(scale.dtype).eps
    a, b, scale = a.float(), b.float(), scale.float()
    return bool((a - b).norm() <= 1e-2 * b.norm() + 2 * eps * scale.norm())
