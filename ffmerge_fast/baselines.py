"""What the two methods are compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from .merging.apply import check_unmerged, merge_
from .merging.groups import anchor_of, parse_layers
from .merging.plan import plan
from .models.elsewhere import needs_weights
from .models.sublayers import find_ffns
from .models.summary import ModelSummary
from .projecting.importance import Importance
from .projecting.projector import chosen, resolve
from .projecting.settings import Widths
from .projecting.student import build_student, fresh_student
from .support.tensors import not_inference


@not_inference
def tie_without_average(model: nn.Module, layers: str | Sequence | Mapping, anchor: str = "first") -> nn.Module:
    """A copy of `model` in which all layers of a group use the anchor's FFN as it is ("copy" in tables).

    Args:
        model: unmerged; stays as it is.
        layers: groups, as in `plan`.
        anchor: "first", "middle" or "last" layer of each group.

    Raises:
        FFMergeError: layers that cannot be merged, unknown anchor, a model that is merged already.
    """
    needs_weights(model, "tie_without_average")
    ffns = find_ffns(model)
    check_unmerged(model, ffns)
    tied = copy.deepcopy(model)
    for stack, indices in parse_layers(layers, ffns):
        sources = ffns.at(stack, anchor_of(indices, anchor)).shared
        for ffn in ffns.of(stack, indices):
            for path, source in zip(ffn.shared, sources, strict=True):
                tied.get_submodule(path).load_state_dict(tied.get_submodule(source).state_dict())
    return merge_(tied, plan(layers=layers, anchor=anchor, method="average", model=tied))


@not_inference
def hard_prune(
    model: nn.Module,
    keep: float | None = None,
    d_model: int | None = None,
    d_ff: int | Mapping[str, int] | None = None,
    importance: Importance | None = None,
    attention: str = "heads",
    untie_embeddings: bool | None = None,
) -> nn.Module:
    """A smaller model of the same class that keeps the most important dimensions' weights and drops the rest.

    It is the student `project` starts from, with the same arguments; retrained plainly it is the baseline of paper B.

    Raises:
        FFMergeError: as `project`.
    """
    needs_weights(model, "hard_prune")
    layout, sizes = resolve(model, Widths(keep, d_model, d_ff, attention, untie_embeddings))
    base = ModelSummary.of(model, layout.ffns)
    return build_student(model, layout, sizes, chosen(model, base, layout, sizes, importance))


@not_inference
def from_scratch(
    model: nn.Module,
    keep: float | None = None,
    d_model: int | None = None,
    d_ff: int | Mapping[str, int] | None = None,
    attention: str = "heads",
    untie_embeddings: bool | None = None,
    seed: int = 0,
) -> nn.Module:
    """The model `hard_prune` makes with the same arguments, with weights drawn anew by the architecture's own rule.

    What a small model reaches that learned nothing from the large one.

    Args:
        seed: of the weights; torch's global random numbers stay as they are.

    Raises:
        FFMergeError: as `project`.
    """
    layout, sizes = resolve(model, Widths(keep, d_model, d_ff, attention, untie_embeddings))
    return fresh_student(model, layout, sizes, seed)
