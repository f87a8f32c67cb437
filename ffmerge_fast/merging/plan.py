"""Which layers to merge and how their neurons match: `plan` and the `MergePlan` it returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.sublayers import FFNs
from ..models.summary import ModelSummary
from ..support.errors import FFMergeError
from ..support.sealed import DamagedError, sealed, unsealed
from ..support.sizes import format_bytes
from ..support.tables import format_table
from ..support.tensors import not_inference
from .groups import Group, anchor_of, check_groups, format_indices, format_layers, parse_layers, windows
from .methods import MATCHES, Sources
from .settings import METHODS, SMALLEST_SKETCH
from .sketching import WANTED_LOSS
from .statistics import CorrelationStats

FORMAT = 1


@dataclass(frozen=True)
class MergeGroup:
    """Layers that become one FFN.

    Attributes:
        stack: "encoder" or "decoder".
        layers: their indices, rising.
        anchor: the layer the others are aligned to.
        permutations: {layer: int64 [d_ff]}; neuron j of the merged FFN is the layer's neuron `permutation[j]`.
        scores: {layer: (mean correlation of matched neurons, the same before alignment)}, where it was measured.
    """

    stack: str
    layers: tuple[int, ...]
    anchor: int
    permutations: Mapping[int, Tensor]
    scores: Mapping[int, tuple[float, float]]

    def check(self, ffns: FFNs) -> None:
        """Raise FFMergeError unless anchor, permutations and scores fit these layers, which do exist."""
        name, wanted = f"{self.stack} {format_indices(self.layers)}", set(self.layers)
        if list(self.layers) != sorted(self.layers):
            raise FFMergeError(f"layers: got {list(self.layers)}, wanted them in rising order")
        if self.anchor not in wanted:
            raise FFMergeError(f"anchor: got layer {self.anchor!r}, wanted one of group {name}")
        if self.permutations.keys() != wanted:
            raise FFMergeError(f"permutations: got layers {sorted(self.permutations)}, wanted those of group {name}")
        for layer, permutation in self.permutations.items():
            identity = torch.arange(ffns.at(self.stack, layer).d_ff)
            found = permutation.cpu() if layer == self.anchor else permutation.cpu().sort().values
            if not torch.equal(found, identity):
                what = "the identity, as it is the anchor" if layer == self.anchor else "a permutation"
                raise FFMergeError(
                    f"permutations: layer {layer} of group {name} has {list(permutation.shape)} numbers that are not "
                    f"{what} of its {len(identity)} neurons"
                )
        for layer, scores in self.scores.items():
            if layer not in wanted - {self.anchor} or len(scores) != 2 or not all(map(math.isfinite, scores)):
                raise FFMergeError(f"scores: got {list(scores)} for layer {layer} of group {name}, wanted two numbers")


class Sketched(NamedTuple):
    """What a plan's neurons were matched on, where that was no exact correlation."""

    rows: int  # of each layer's sketch
    expected_loss: float  # of the matched correlation, as a share; measured on one pair of layers

    def __str__(self) -> str:
        more = f"; collect with --sketch {2 * self.rows} for half of it" if self.expected_loss > WANTED_LOSS else ""
        return (
            f"matched on sketches of {self.rows:,} rows: expected loss {self.expected_loss:.2%} of the matches" + more
        )


@dataclass
class MergePlan:
    """Everything `merge_` needs. Prints as a table.

    Attributes:
        model: summary of the model it was made for.
        method: "permute", "average", "random" or "weights".
        groups: disjoint groups of layers.
        search: [("4-7", score), ...] of all windows, if a search made this plan.
        sketched: what the neurons were matched on, where that was a sketch.
    """

    model: ModelSummary
    method: str
    groups: list[MergeGroup]
    search: list[tuple[str, float]] = field(default_factory=list)
    sketched: Sketched | None = None

    @property
    def layers(self) -> str:
        """The groups as text, as `plan(layers=...)` takes them."""
        return format_layers([(g.stack, g.layers) for g in self.groups], self.model.stacks)

    @property
    def mean_correlation(self) -> float:
        """Mean correlation of matched neurons over all aligned layers; NaN where it was not measured."""
        matched = [s[0] for g in self.groups for s in g.scores.values()]
        return sum(matched) / len(matched) if matched else float("nan")

    @property
    def parameters_after(self) -> int:
        return self.model.parameters - self._removed("parameters")

    @property
    def nbytes_after(self) -> int:
        return self.model.nbytes - self._removed("nbytes")

    def _removed(self, attribute: str) -> int:
        removed = (ffn for g in self.groups for ffn in self.model.ffns.of(g.stack, g.layers[1:]))
        return sum(getattr(ffn, attribute) for ffn in removed)

    def __post_init__(self):
        self.check(self.model.ffns)

    def check(self, ffns: FFNs) -> None:
        """Raise FFMergeError unless the plan is one, as a whole, for a model with these FFNs."""
        try:
            if self.method not in METHODS:
                raise FFMergeError(f"method: got {self.method!r}, wanted one of {', '.join(METHODS)}")
            check_groups([(group.stack, group.layers) for group in self.groups], ffns)
            for group in self.groups:
                group.check(ffns)
        except FFMergeError as error:
            raise FFMergeError(f"plan: {error}; make it again with `ffmerge plan` (ffmerge_fast.plan)") from None

    def __str__(self) -> str:
        rows = []
        for number, group in enumerate(self.groups):
            for i in group.layers:
                matched, unmatched = group.scores.get(i, ("", ""))
                note = "anchor" if i == group.anchor else ""
                rows.append([number, group.stack, i, note, _short(unmatched), _short(matched)])
        headers = ["group", "stack", "layer", "", "correlation as is", "aligned"]
        before, after = self.model.parameters, self.parameters_after
        summary = (
            f"{self.model.model_type}: {self.method}, layers {self.layers}\n"
            f"parameters {before:,} -> {after:,} ({after / before - 1:+.1%}), "
            f"{format_bytes(self.model.nbytes)} -> {format_bytes(self.nbytes_after)}"
        )
        if self.sketched:
            summary += f"\n{self.sketched}"
        return f"{format_table(headers, rows)}\n{summary}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it."""
        groups = [
            {
                "stack": g.stack,
                "layers": list(g.layers),
                "anchor": g.anchor,
                "permutations": {str(i): p.tolist() for i, p in g.permutations.items()},
                "scores": {str(i): list(s) for i, s in g.scores.items()},
            }
            for g in self.groups
        ]
        search = [list(entry) for entry in self.search]
        values = {
            "format": FORMAT,
            "model": self.model.to_dict(),
            "method": self.method,
            "groups": groups,
            "search": search,
        }
        if self.sketched:
            values["sketched"] = list(self.sketched)
        return sealed(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MergePlan:
        """Read what `to_dict` gave.

        Raises:
            FFMergeError: it is none, or of another format; what it says is no plan.
        """
        try:
            if values["format"] != FORMAT:
                raise FFMergeError(f"plan: got format {values['format']!r}, this version reads {FORMAT}")
            groups = [
                MergeGroup(
                    g["stack"],
                    tuple(map(_index, g["layers"])),
                    _index(g["anchor"]),
                    {int(i): _permutation(p) for i, p in g["permutations"].items()},
                    {int(i): tuple(map(float, s)) for i, s in g["scores"].items()},
                )
                for g in values["groups"]
            ]
            search = [(str(layers), math.nan if score is None else float(score)) for layers, score in values["search"]]
            sketched = _sketched(*values["sketched"]) if "sketched" in values else None
            made = cls(ModelSummary.from_dict(values["model"]), values["method"], groups, search, sketched)
            unsealed(values)  # after what says more than "edited or damaged"
            return made
        except DamagedError as error:
            raise FFMergeError(f"plan: {error}; make it again with `ffmerge plan`") from error
        except FFMergeError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            raise FFMergeError(
                f"plan: not the content of a plan file ({error!r}); make it with `ffmerge plan`"
            ) from error


@not_inference
def plan(
    stats: CorrelationStats | None = None,
    layers: str | Sequence | Mapping | None = None,
    window: int | None = None,
    anchor: str = "first",
    method: str = "permute",
    model: nn.Module | None = None,
    seed: int = 0,
    over_ranks: bool = False,
) -> MergePlan:
    """Decide which layers become one FFN, and align their neurons (paper A, sections 3.2 and 3.3).

    Args:
        stats: from `collect`; needed for "permute" and for choosing a window.
        layers: "4-7"; "0-2,6-8" (two groups); "1+4+7" (not adjacent); "encoder:2-4,decoder:2-4"; or lists.
        window: instead of `layers`: of all windows of this size, the one with the highest mean matched correlation.
        anchor: "first", "middle" or "last" layer of each group.
        method: "permute" aligns by correlation; "average" (vanilla) does not align; "random" permutes at random;
            "weights" aligns by the weights themselves.
        model: the model, for "weights", or instead of `stats` for "average" and "random".
        seed: of "random".
        over_ranks: share out the assignments over the ranks of a `torch.distributed` job, all of which call this with
            equal statistics and get the same plan.

    Raises:
        FFMergeError: layers that cannot be merged, a pair without statistics, unknown anchor or method.
    """
    check_given(stats, model, method)
    summary = _summary(stats, model)
    if (layers is None) == (window is None):
        raise FFMergeError("plan: give exactly one of layers= and window=")
    if layers is not None:
        made = plan_groups(stats, summary, parse_layers(layers, summary.ffns), anchor, method, model, seed, over_ranks)
        return note_sketch(made, stats)
    if stats is None:
        raise FFMergeError("plan: choosing a window needs statistics; give stats= or layers=")
    ranked = rank_windows(stats, window, anchor, over_ranks)
    best = max(ranked, key=lambda entry: entry[1])[0]
    chosen = plan_groups(stats, summary, best, anchor, method, model, seed)
    chosen.search = [(format_layers(groups, summary.stacks), score) for groups, score in ranked]
    return note_sketch(chosen, stats)


def note_sketch(made: MergePlan, stats: CorrelationStats | None) -> MergePlan:
    """Note in a plan what its matches are expected to lose, where they were made on sketches.

    Measured on the first group's anchor and the layer farthest from it: one more assignment.
    """
    if made.method == "permute" and stats.sketch is not None:
        group = made.groups[0]
        farthest = max(group.layers, key=lambda i: abs(i - group.anchor))
        made.sketched = Sketched(stats.sketch, stats.expected_loss(group.anchor, farthest, group.stack))
    return made


def rank_windows(
    stats: CorrelationStats, window: int, anchor: str, over_ranks: bool = False
) -> list[tuple[list[Group], float]]:
    """Every window of the given size with its mean matched correlation, in layer order."""
    candidates = windows(stats.model.ffns, window)
    _align(stats, [group for groups in candidates for group in groups], anchor, over_ranks)
    ranked = []
    for groups in candidates:
        made = plan_groups(stats, stats.model, groups, anchor, "permute", None, 0)
        ranked.append((groups, made.mean_correlation))
    return ranked


def check_given(stats: CorrelationStats | None, model: nn.Module | None, method: str) -> None:
    """Raise FFMergeError for an unknown method, or one that lacks what it needs."""
    if method not in METHODS:
        raise FFMergeError(f"method: got {method!r}, wanted one of {', '.join(METHODS)}")
    if method == "permute" and stats is None:
        raise FFMergeError("plan: method 'permute' needs statistics; give stats= (from collect) or another method")
    if method == "weights" and model is None:
        raise FFMergeError("plan: method 'weights' compares weights; give model=")
    if stats is None and model is None:
        raise FFMergeError("plan: give stats= or model=")


def _summary(stats: CorrelationStats | None, model: nn.Module | None) -> ModelSummary:
    if model is None:
        return stats.model
    found = ModelSummary.of(model)
    if stats is None:
        return found
    stats.model.check(found, "stats")
    return stats.model


def plan_groups(stats, summary, groups: Sequence[Group], anchor, method, model, seed, over_ranks=False) -> MergePlan:
    """`plan` for groups and arguments that are checked; `summary` is of the model."""
    ffns = summary.ffns
    sources = Sources(stats, model, torch.Generator().manual_seed(seed))
    made = []
    if method == "permute":
        _align(stats, groups, anchor, over_ranks)
    for stack, indices in groups:
        first = anchor_of(indices, anchor)
        permutations = {first: torch.arange(ffns.at(stack, first).d_ff)}
        scores = {}
        for i in (i for i in indices if i != first):
            match = MATCHES[method](sources, ffns.at(stack, first), ffns.at(stack, i))
            permutations[i] = match.permutation
            if match.scores:
                scores[i] = match.scores
        made.append(MergeGroup(stack, tuple(indices), first, dict(sorted(permutations.items())), scores))
    return MergePlan(summary, method, made)


def _index(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a layer")
    return value


def _sketched(rows: object, loss: object) -> Sketched:
    if type(rows) is not int or rows < SMALLEST_SKETCH or not 0 <= float(loss) < math.inf:
        raise ValueError(f"{rows!r} rows with an expected loss of {loss!r} are no sketch")
    return Sketched(rows, float(loss))


def _permutation(values: Sequence[int]) -> Tensor:
    found = torch.tensor(values)
    if found.dtype != torch.int64:
        raise ValueError("a permutation holds other values than integers")
    return found


def _align(stats: CorrelationStats, groups: Sequence[Group], anchor: str, over_ranks: bool = False) -> None:
    """Make sure that the statistics hold every alignment the groups need; several are computed at a time."""
    wanted = []
    for stack, indices in groups:
        first = anchor_of(indices, anchor)
        for i in (i for i in indices if i != first):
            if not stats.holds(stack, first, i):
                raise FFMergeError(
                    f"plan: the statistics hold no correlation of {stack} layers {first} and {i}; collect again with a "
                    "larger window= or with these layers="
                )
            wanted.append((stack, first, i))
    stats.align(wanted, over_ranks)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"
