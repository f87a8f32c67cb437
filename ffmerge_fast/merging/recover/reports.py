"""What `refit_` and `local_distill_` say that they did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...support.tables import format_table
from ..groups import format_indices


@dataclass(frozen=True)
class RecoveredGroup:
    """A group of layers, and how far its shared FFN was and is from their own outputs."""

    stack: str
    layers: tuple[int, ...]
    before: float
    after: float


@dataclass(frozen=True)
class RefitGroup(RecoveredGroup):
    """What the first fit did for one group.

    Attributes:
        stack, layers: of the group.
        before, after: share of the FFN outputs' (weighted) variance on the calibration tokens that the shared FFN
            misses, before and after the fit; without b_down, of their second moment.
        private_neurons: of each layer, beside the shared ones; 0 without.
        private_parameters: how many parameters they added.
    """

    private_neurons: int = 0
    private_parameters: int = 0


@dataclass(frozen=True)
class DistillGroup(RecoveredGroup):
    """What `local_distill_` did for one group.

    Attributes:
        stack, layers: of the group.
        before, after: share of the FFN outputs' (weighted) variance on the held-out tokens that the shared FFN misses.
        best: the step whose weights the model has; 0: those it had, with the first deltas if there are any.
        history: [(step, the share missed on held-out tokens), ...].
        losses: [(step, the merged model's loss on held-out batches), ...], where the best step is chosen by it.
        delta_rank: of the layers' deltas, 0 without.
        delta_parameters: how many parameters they added.
    """

    best: int
    history: list[tuple[int, float]] = field(repr=False)
    delta_rank: int = 0
    delta_parameters: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list, repr=False)


@dataclass
class RecoveryReport:
    """What was done, group by group."""

    groups: list[RecoveredGroup]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def _table(self, recovery: str, columns: Mapping[str, str]) -> str:
        """A row for each group; columns: {header: attribute} besides those that every recovery has."""
        headers = ["stack", "layers", "output missed before", f"after {recovery}", *columns]
        rows = [
            [g.stack, format_indices(g.layers), g.before, g.after, *(getattr(g, name) for name in columns.values())]
            for g in self.groups
        ]
        return format_table(headers, rows)


@dataclass
class RefitReport(RecoveryReport):
    """What `refit_` did. Prints as a table.

    Attributes:
        groups: one entry per merged group.
        scores: of the model before the refit, after the first fit and after each round; empty if none was taken.
        best: which of `scores` the model now has.
    """

    groups: list[RefitGroup]
    scores: list[float] = field(default_factory=list)
    best: int = 0

    def __str__(self) -> str:
        columns = {}
        if any(g.private_neurons for g in self.groups):
            columns = {"private neurons": "private_neurons", "private parameters": "private_parameters"}
        text = self._table("refit", columns)
        if not self.scores:
            return text
        names = ["merged", "refit", *(f"round {i}" for i in range(1, len(self.scores) - 1))]
        names[self.best] += " (kept)"
        return f"{text}\n\n{format_table(['', 'score'], list(zip(names, self.scores, strict=True)))}"


@dataclass
class DistillReport(RecoveryReport):
    """What `local_distill_` did, group by group. Prints as a table."""

    groups: list[DistillGroup]

    def __str__(self) -> str:
        columns = {"best step": "best"}
        if any(g.delta_rank for g in self.groups):
            columns |= {"delta rank": "delta_rank", "delta parameters": "delta_parameters"}
        return self._table("distillation", columns)
