"""What `refit_` says that it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ...support.tables import format_table
from ..groups import format_layers


@dataclass(frozen=True)
class RefitGroup:
    """What the first fit did for one group.

    Attributes:
        stack, layers: of the group.
        before, after: share of the FFN outputs' (weighted) variance on the calibration tokens that the shared FFN
            misses, before and after the fit; without b_down, of their second moment.
    """

    stack: str
    layers: tuple[int, ...]
    before: float
    after: float


@dataclass
class RefitReport:
    """What `refit_` did. Prints as a table.

    Attributes:
        groups: one entry per merged group.
        scores: of the model before the refit, after the first fit and after each round; empty if none was taken.
        best: which of `scores` the model now has.
    """

    groups: list[RefitGroup]
    scores: list[float] = field(default_factory=list)
    best: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [[g.stack, format_layers([(g.stack, g.layers)], [g.stack]), g.before, g.after] for g in self.groups]
        text = format_table(["stack", "layers", "output missed before", "after refit"], rows)
        if not self.scores:
            return text
        names = ["merged", "refit", *(f"round {i}" for i in range(1, len(self.scores) - 1))]
        names[self.best] += " (kept)"
        return f"{text}\n\n{format_table(['', 'score'], list(zip(names, self.scores, strict=True)))}"


@dataclass(frozen=True)
class DistillGroup:
    """What `local_distill_` did for one group.

    Attributes:
        stack, layers: of the group.
        before, after: share of the FFN outputs' (weighted) variance on the held-out tokens that the shared FFN misses.
        best: the step whose weights the model has; 0: those it had, with the first deltas if there are any.
        history: [(step, the share missed on held-out tokens), ...].
        delta_rank: of the layers' deltas, 0 without.
        delta_parameters: how many parameters they added.
    """

    stack: str
    layers: tuple[int, ...]
    before: float
    after: float
    best: int
    history: list[tuple[int, float]] = field(repr=False)
    delta_rank: int = 0
    delta_parameters: int = 0


@dataclass
class DistillReport:
    """What `local_distill_` did, group by group. Prints as a table."""

    groups: list[DistillGroup]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            [g.stack, format_layers([(g.stack, g.layers)], [g.stack]), g.before, g.after, g.best] for g in self.groups
        ]
        columns = ["stack", "layers", "output missed before", "after distillation", "best step"]
        if any(g.delta_rank for g in self.groups):
            columns += ["delta rank", "delta parameters"]
            rows = [[*row, g.delta_rank, g.delta_parameters] for row, g in zip(rows, self.groups, strict=True)]
        return format_table(columns, rows)
