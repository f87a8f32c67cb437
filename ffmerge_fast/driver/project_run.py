"""Projected compression from data to a small model, with everything a killed run needs to go on in one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..baselines import hard_prune
from ..projecting.importance import Importance, importance
from ..projecting.projector import Projector, project, resolve
from ..projecting.settings import Widths
from ..projecting.student import fold
from ..support import distributed
from ..support.errors import FFMergeError
from ..support.files import write_json
from .tasks.task import Task
from .training import state
from .training.finetune import FinetuneResult, finetune
from .training.settings import TrainingSettings

_IMPORTANCE, _PROJECTION = "importance.safetensors", "projection.json"


def project_and_train(
    model: nn.Module,
    task: Task,
    work: Path,
    steps: int,
    settings: TrainingSettings,
    *,
    options: Mapping[str, Any],
    scores: Importance | str | Path | None = None,
    method: str = "activation",
    calibration: int = 32,
    optimizer: Mapping[str, Any] | None = None,
    teacher: nn.Module | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> tuple[Projector, FinetuneResult]:
    """Score, project and train; a run that was killed goes on in the same `work` folder.

    Args:
        model: the base; it stays as it is and may be its own student's `teacher`. With an `offload_base`, and where it
            is not the teacher, its parameters are let go of (moved to "meta"), so that their memory is free.
        task: data; its "train" batches calibrate and train.
        work: folder for the importances, the projection's settings, and finetune's log and checkpoints.
        settings: of the training; batch_size and seed also of the importances.
        options: of `project`: keep or d_model and d_ff, attention, residual, share, untie_embeddings, init.
        scores: importances, or their file; default: `method` on `calibration` batches, kept in `work`.
        optimizer: of `Projector.optimizer`, beside lr and weight_decay.
        teacher, evaluate: of `finetune`.

    Raises:
        FFMergeError: `work` was begun with other settings (says which); and as importance, project and finetune.
    """
    resolve(model, Widths(**{f.name: options[f.name] for f in fields(Widths) if f.name in options}))
    if isinstance(scores, (str, Path)):
        scores = Importance.load(scores)
    work.mkdir(parents=True, exist_ok=True)
    found = _scores(model, task, work, scores, method, calibration, settings)
    proj = project(model, importance=found, **options)
    _remember(work / _PROJECTION, proj)
    chosen = {"offload_dir": work} | dict(optimizer or {})

    def make_optimizer():
        made = proj.optimizer(lr=settings.lr, weight_decay=settings.weight_decay, **chosen)
        if chosen.get("offload_base") and teacher is not model:
            model.to("meta")
        return made

    return proj, finetune(
        proj.student,
        task,
        steps,
        settings=replace(settings, weight_decay=0.0),  # the optimiser's own
        optimizer=make_optimizer,
        teacher=teacher,
        evaluate=evaluate,
        output_dir=work,
    )


def fold_run(model: nn.Module, work: Path) -> nn.Module:
    """The small model of a run in `work`: its best weights if it evaluated, else its last checkpoint's.

    Raises:
        FFMergeError: no run of `project_and_train` there, or one of another model.
    """
    if not (work / _PROJECTION).exists():
        raise FFMergeError(f"fold: {work} has no {_PROJECTION}; give the work folder of `ffmerge project`")
    settings = json.loads((work / _PROJECTION).read_text())
    names = ("d_model", "d_ff", "attention")
    widths = {name: settings[name] for name in names if settings[name] is not None}
    student = hard_prune(
        model, importance=Importance.load(work / _IMPORTANCE), untie_embeddings=settings["untied"], **widths
    )
    checkpoints, best = (state.folders(work, kind) for kind in (state.CHECKPOINT, state.BEST))
    if not checkpoints and not best:
        raise FFMergeError(f"fold: {work} holds no checkpoint yet; train longer, or with --save-every")
    state.load_weights_(max((best or checkpoints).items())[1], student)
    return fold(student)


def _scores(model, task, work, scores, method, calibration, settings: TrainingSettings) -> Importance:
    path = work / _IMPORTANCE
    if scores is None and path.exists():
        scores = Importance.load(path)
        if scores.method != method:
            raise FFMergeError(f"{path} was made by {scores.method!r}, not {method!r}; give another work folder")
    if scores is None:
        stream = task.batches(
            "train", settings.batch_size, shuffle=True, seed=settings.seed,
            rank=distributed.rank(), world=distributed.world_size(),
        )  # fmt: skip
        scores = importance(model, _first(stream, calibration), method=method, seed=settings.seed)
    scores.check(model)
    if distributed.rank() == 0 and not path.exists():
        scores.save(path)
    return scores


def _first(batches, count):
    for _, batch in zip(range(count), batches, strict=False):
        yield batch


def _remember(path: Path, proj: Projector) -> None:
    settings = json.loads(json.dumps(proj.settings))
    found = json.loads(path.read_text()) if distributed.rank() == 0 and path.exists() else None
    before = distributed.from_rank_zero(found)
    if before is None:
        distributed.on_rank_zero(lambda: write_json(path, settings))
        return
    for name, value in settings.items():
        if before.get(name) != value:
            raise FFMergeError(
                f"resume: {name} was {before.get(name)!r} in {path.parent} and is {value!r} now; give the same, or "
                "another work folder"
            )
