"""What the two methods are compared with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .project.importance import Importance
from .project.projector import chosen, resolve
from .project.student import build_student


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
    layout, sizes, untie = resolve(model, keep, d_model, d_ff, attention, untie_embeddings)
    return build_student(model, layout, sizes, chosen(model, layout, sizes, importance), untie)
