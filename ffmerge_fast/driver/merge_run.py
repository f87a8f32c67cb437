"""A merge and the recoveries after it, with the reports that are kept beside the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..merging.apply import merge_
from ..merging.plan import MergePlan
from ..merging.recover.distill import local_distill_
from ..merging.recover.refit import refit_
from ..merging.recover.reports import DistillReport, RefitReport
from ..models.elsewhere import bring_, elsewhere
from ..models.streamed import HANDLE
from ..models.sublayers import find_ffns
from ..models.ties import shared_groups
from ..support.errors import FFMergeError
from ..support.files import json_text
from ..support.timing import timed

# function(model, teacher, batches, **options) -> report, with to_dict() and a text
RECOVERIES: dict[str, Callable[..., RefitReport | DistillReport]] = {"refit": refit_, "distill": local_distill_}


@dataclass(frozen=True)
class MergeRun:
    """What was done to a model. Prints as the plan's and the reports' tables.

    Attributes:
        reports: of the recoveries, in the order in which they ran.
        seconds: {"merge" or recovery: how long it took}.
    """

    plan: MergePlan
    reports: dict[str, RefitReport | DistillReport]
    seconds: dict[str, float]

    def files(self) -> dict[str, str]:
        """{name: text} of plan and reports, as `save_pretrained(extras=...)` takes them."""
        found = {"plan.json": json_text(self.plan.to_dict()), "plan.txt": f"{self.plan}\n"}
        for name, report in self.reports.items():
            found |= {f"{name}.json": json_text(report.to_dict()), f"{name}.txt": f"{report}\n"}
        return found

    def __str__(self) -> str:
        return "".join([str(self.plan), *(f"\n\n{report}\n" for report in self.reports.values())])


def merge_and_recover_(
    model: nn.Module,
    plan: MergePlan,
    recoveries: Sequence[str] = (),
    *,
    batches: Callable[[], Iterable[Any]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    teacher: nn.Module | None = None,
) -> MergeRun:
    """Merge in place; then run each recovery, with the model as it was before as the teacher.

    Args:
        teacher: the same model again, where the weights of `model` are elsewhere; else it is made of the model's parts.
        recoveries: names of RECOVERIES, in their order.
        batches: gives calibration data, anew for each recovery.
        options: {recovery: keyword arguments of its function}.

    Raises:
        FFMergeError: an unknown recovery, or one without data; and as `merge_` and the recoveries.
    """
    if unknown := [name for name in recoveries if name not in RECOVERIES]:
        raise FFMergeError(f"recoveries: got {unknown[0]!r}, wanted {' or '.join(RECOVERIES)}")
    if recoveries and batches is None:
        raise FFMergeError("batches: a recovery needs calibration data; give a function that returns batches")
    run = MergeRun(plan, {}, {})
    if recoveries and teacher is None:
        teacher = _as_it_is(model)
    with timed(run.seconds, "merge"):
        merge_(model, plan)
    if recoveries and elsewhere(model) is not None:
        _check_needs_no_passes(recoveries, options or {})
        _bring_merged_(model, teacher)
    for name in recoveries:
        with timed(run.seconds, name):
            run.reports[name] = RECOVERIES[name](model, teacher, batches(), **(options or {}).get(name, {}))
    return run


def _as_it_is(model: nn.Module) -> nn.Module:
    """The model again, as a teacher of what it becomes: its matrices are the model's own, as a merge replaces those of
    its FFNs and recoveries change no others; what is smaller (norms, which distillation trains) is copied."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.ndim >= 2}
    return copy.deepcopy(model, shared)


def _check_needs_no_passes(recoveries: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise FFMergeError for what runs the merged model, which is not in memory."""
    rounds = options.get("refit", {}).get("rounds", 0) or options.get("refit", {}).get("inputs") == "merged"
    if "distill" in recoveries or rounds:
        name = "distill" if "distill" in recoveries else "refit with rounds"
        raise FFMergeError(
            f"recover: {name} runs the merged model, whose weights are in files here; give --place cpu or cuda, or "
            "--recover refit without rounds"
        )


def _bring_merged_(model: nn.Module, teacher: nn.Module) -> None:
    """Have the shared FFNs in memory, where the teacher runs."""
    stream = getattr(teacher, HANDLE, None)
    device = stream.device if stream is not None else next(teacher.parameters()).device
    ffns = find_ffns(model)
    for stack, layers in shared_groups(model):
        bring_(model, (model.get_submodule(path) for path in ffns.at(stack, layers[0]).shared), device)
