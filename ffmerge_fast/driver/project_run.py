"""Projected compression from data to a small model, with everything a killed run needs to go on in one folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..baselines import hard_prune
from ..models.elsewhere import reader_of
from ..projecting.importance import Importance, importance
from ..projecting.projector import Projector, project, resolve
from ..projecting.settings import Reconstructing, Widths
from ..projecting.student import fold
from ..support import distributed
from ..support.digests import content_hash, weights_hash
from ..support.errors import FFMergeError
from ..support.resume import Signature, in_use
from ..support.sealed import DamagedError, read_sealed_json, write_sealed_json
from .tasks.task import Task
from .training import state
from .training.finetune import FinetuneResult, finetune
from .training.settings import TrainingSettings

_IMPORTANCE, _PROJECTION = "importance.safetensors", "projection.json"
_BY_DEFAULT = Reconstructing()
_RECONSTRUCTION = "reconstruction*.safetensors"  # one of each rank


def project_and_train(
    model: nn.Module,
    task: Task,
    work: Path,
    steps: int,
    settings: TrainingSettings,
    *,
    options: Mapping[str, Any],
    reconstruct: Reconstructing | None = _BY_DEFAULT,
    scores: Importance | str | Path | None = None,
    method: str = "activation",
    calibration: int = 32,
    optimizer: Mapping[str, Any] | None = None,
    teacher: nn.Module | None = None,
    clone: bool = False,
    evaluate: Callable[[nn.Module], float] | None = None,
    signature: Mapping[str, Any] | None = None,
    tell: Callable[[str], Any] | None = None,
) -> tuple[Projector, FinetuneResult]:
    """Score, project and train; a run that was killed goes on in the same `work` folder.

    Args:
        model: the base; it stays as it is and may be its own student's `teacher`. With an `offload_base`, and where it
            is not the teacher, its parameters are let go of (moved to "meta"), so that their memory is free.
        task: data; its "train" batches calibrate and train.
        work: folder for the importances, the projection's settings, and finetune's log and checkpoints.
        settings: of the training; batch_size and seed also of the importances.
        options: of `project`: keep or d_model and d_ff, attention, residual, share, untie_embeddings, init (None: "svd"
            where the stream gets narrower and is reconstructed, else "selection").
        reconstruct: how the start is fitted to the base, on the batches that calibrate; None: not at all (paper).
        scores: importances, or their file; default: `method` on `calibration` batches, kept in `work`.
        optimizer: of `Projector.optimizer`, beside lr and weight_decay.
        clone: add the clone loss; the base must be the teacher.
        teacher, evaluate, signature: of `finetune`.
        tell: told in a line what reconstructing will take.

    Raises:
        FFMergeError: `work` is of another run (says what differs), damaged or in use; and as importance, project and
            finetune.
    """
    if clone and teacher is not model:
        raise FFMergeError("clone: got it without the base as the teacher; give teacher=model (--distill)")
    if not settings.fresh and (work / _PROJECTION).exists() and "reconstruct" not in _read(work / _PROJECTION):
        reconstruct = None  # a run of an earlier version goes on as it began
    widths = Widths(**{f.name: options[f.name] for f in fields(Widths) if f.name in options})
    layout, sizes = resolve(model, widths)
    if options.get("init") is None:
        turned = reconstruct is not None and sizes.d_model < layout.d_model
        options = {**options, "init": "svd" if turned else "selection"}
    if isinstance(scores, (str, Path)):
        scores = Importance.load(scores)
    if scores is not None:
        scores.check(model)
    distributed.on_rank_zero(lambda: _make(work))
    with _held(work):
        if settings.fresh:
            distributed.on_rank_zero(lambda: _clear(work))
        decide = _signature(model, task, scores, method, calibration, settings)
        found = _scores(model, task, work, scores, method, calibration, settings, decide)
        proj = project(model, importance=found, **options)
        how = None if reconstruct is None else replace(reconstruct, seed=settings.seed)
        _remember(work / _PROJECTION, proj, how)
        if how is not None:
            stream = _first(_training_batches(task, settings), calibration)
            proj.reconstruct_(stream, **vars(how), cache_dir=work, tell=tell)
        decide |= signature or {}
        return proj, _train(model, proj, task, work, steps, settings, optimizer, teacher, clone, evaluate, decide)


def _train(model, proj, task, work, steps, settings, optimizer, teacher, clone, evaluate, signature) -> FinetuneResult:
    chosen = {"offload_dir": work} | dict(optimizer or {})

    def make_optimizer():
        made = proj.optimizer(lr=settings.lr, weight_decay=settings.weight_decay, **chosen)
        if chosen.get("offload_base") and teacher is not model:
            model.to("meta")
        return made

    return finetune(
        proj.student,
        task,
        steps,
        settings=replace(settings, weight_decay=0.0),  # the optimiser's own
        optimizer=make_optimizer,
        teacher=teacher,
        clone=proj.clone_loss() if clone else None,
        evaluate=evaluate,
        output_dir=work,
        signature=signature,
    )


def fold_run(model: nn.Module, work: Path) -> nn.Module:
    """The small model of a run in `work`: its best weights if it evaluated, else its last checkpoint's.

    Raises:
        FFMergeError: no run of `project_and_train` there, or one of another model.
    """
    if not (work / _PROJECTION).exists():
        raise FFMergeError(f"fold: {work} has no {_PROJECTION}; give the work folder of `ffmerge project`")
    settings = _read(work / _PROJECTION)
    names = ("d_model", "d_ff", "attention")
    widths = {name: settings[name] for name in names if settings[name] is not None}
    student = hard_prune(
        model, importance=Importance.load(work / _IMPORTANCE), untie_embeddings=settings["untied"], **widths
    )
    checkpoints, best = (state.folders(work, kind) for kind in (state.CHECKPOINT, state.BEST))
    if not checkpoints and not best:
        raise FFMergeError(f"fold: {work} holds no checkpoint yet; train longer, or with --save-every")
    run = state.read_state(max(checkpoints.items())[1]).get("run") if checkpoints else None
    state.load_weights_(max((best or checkpoints).items())[1], student, run)
    return fold(student)


def _make(work: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FFMergeError(f"work: {work} cannot be made: {error.strerror}") from error


@contextlib.contextmanager
def _held(work: Path) -> Iterator[None]:
    with contextlib.ExitStack() as context:
        distributed.on_rank_zero(lambda: context.enter_context(in_use(work, "work")))
        yield


def _clear(work: Path) -> None:
    for name in (_IMPORTANCE, _PROJECTION):
        (work / name).unlink(missing_ok=True)
    for path in work.glob(_RECONSTRUCTION):
        path.unlink()


def _signature(model, task, scores, method, calibration, settings: TrainingSettings) -> Signature:
    """What decides the importances."""
    made = {"base": weights_hash(model, reader_of(model))}
    if scores is not None:
        return Signature(made | {"importance": content_hash(scores.method, scores.scores)})
    made |= {"importance": None, "method": method, "calibration": calibration, "seed": settings.seed}
    made |= {"batch_size": settings.batch_size, "world_size": distributed.world_size()}
    return Signature(made | task.signature())


def _scores(model, task, work, scores, method, calibration, settings, signature: Signature) -> Importance:
    path = work / _IMPORTANCE
    found = distributed.from_rank_zero(path.exists())
    if found:
        kept, told = Importance.load_with_progress(path)
        of_kept = {"method": kept.method} | told.get("signature", {})
        signature.check(of_kept, f"resume: {work}")
        scores = kept if scores is None else scores
    if scores is None:
        stream = _first(_training_batches(task, settings), calibration)
        scores = importance(model, stream, method=method, seed=settings.seed)
    scores.check(model)
    if distributed.rank() == 0 and not found:
        scores.save(path, signature=signature)
    return scores


def _training_batches(task: Task, settings: TrainingSettings):
    """This rank's, in the order of the training."""
    return task.batches(
        "train", settings.batch_size, shuffle=True, seed=settings.seed,
        rank=distributed.rank(), world=distributed.world_size(),
    )  # fmt: skip


def _first(batches, count):
    for _, batch in zip(range(count), batches, strict=False):
        yield batch


def _remember(path: Path, proj: Projector, how: Reconstructing | None) -> None:
    settings = Signature(proj.settings | {"reconstruct": None if how is None else vars(how)})
    if distributed.from_rank_zero(path.exists()):
        settings.check(_read(path), f"resume: {path.parent}")
    else:
        distributed.on_rank_zero(lambda: write_sealed_json(path, settings))


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_sealed_json(path)
    except DamagedError as error:
        raise FFMergeError(f"resume: {path} cannot be read ({error}); begin anew with --fresh (fresh=True)") from error
