"""Fine-tuning: a plain AdamW loop that keeps ties, resumes exactly and runs under torchrun."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...models.elsewhere import needs_weights
from ...models.forward import evaluating, without_cache
from ...projecting.clone import CloneLoss
from ...support import distributed
from ...support.digests import content_hash, weights_hash
from ...support.errors import FFMergeError
from ...support.settings import changed
from .loop import DeferredInterrupt, TrainingRun
from .losses import LossFunction
from .master_weights import autocast_of, float32_weights, half_weights
from .parallel import device_of, parallelize
from .run_folder import RunFolder
from .settings import TrainingSettings

_BATCHES = 64  # of a sequence, that are hashed


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did. `history`: the rows of log.jsonl, among them those before a resume."""

    history: list[dict[str, Any]] = field(repr=False)
    best_metric: float | None
    best_step: int | None
    steps: int
    seconds: float


def finetune(
    model: nn.Module,
    train: Any,
    steps: int,
    lr: float | None = None,
    *,
    settings: TrainingSettings | None = None,
    optimizer: torch.optim.Optimizer | Callable[[], torch.optim.Optimizer] | None = None,
    teacher: nn.Module | None = None,
    clone: CloneLoss | None = None,
    loss_fn: LossFunction | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    output_dir: str | os.PathLike | None = None,
    signature: Mapping[str, Any] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    **overrides: Any,
) -> FinetuneResult:
    """Train a model in place with AdamW. Shared weights have one optimiser state and the sum of their gradients.

    Ties are kept: parameters are changed in place. A run killed at any time goes on from its last checkpoint and
    gives bit for bit what it would have given, if `train` is a `Task`, a sequence or a function, and the machine is
    the same. Ctrl-C finishes the step, saves, and raises KeyboardInterrupt. Micro-batches and ranks count by their
    labels: the gradient is that of one large batch. Weights in bfloat16 or float16 are trained as float32, with forward
    passes under autocast in their dtype (float16 on CPUs: in float32), and rounded at the end; checkpoints hold
    float32. An `optimizer` of yours finds them as they are.

    Args:
        model: its forward returns an object with `.loss` for a batch; otherwise give `loss_fn`.
        train: a `Task` (see `load_task`), whose "train" batches are taken; a sequence or re-iterable of batches, gone
            through again and again; or a function of the number of batches to pass over that returns an iterator.
            Batches are dicts. With several ranks, each takes every world-th batch (a function must do so itself).
        steps: optimiser steps in total, those before a resume included.
        lr: highest learning rate, 5e-5 if given nowhere; see `schedules.learning_rate`.
        settings: how to train; default `TrainingSettings()` (`driver.training.settings`), whose help lists all of them.
        optimizer: instead of AdamW, one made for this model's parameters (`Projector.optimizer`), or a function that
            makes it, called when the model is sharded. The schedule sets its lr; weight decay, betas and eps are its
            own, those given here are not used.
        teacher: distils from this model: (1 - alpha) · loss + alpha · T² · KL(teacher ‖ model).
        clone: `Projector.clone_loss()` of the student and its base, which is the teacher: settings.clone_weight times
            the distance of what their matrices give is added to the loss.
        loss_fn: `loss_fn(model, batch)` -> scalar mean loss, instead of `model(**batch).loss`.
        evaluate: `evaluate(model)` -> metric; default for a Task with validation data: its `score`.
        output_dir: folder for log.jsonl, the last checkpoint and the best weights. A run goes on there if it is the
            same: settings, weights of `model` and `teacher`, and data: a Task's examples (`Task.signature`), or the
            number and the first 64 of a sequence of batches; other data is not compared.
        signature: what else decides the result, by name, as JSON values; compared too.
        log: called with every row of the log.
        overrides: single settings by name (`warmup=100, schedule="linear"`), stronger than `settings`.

    Raises:
        FFMergeError: a bad argument; no data; a loss or gradient that is not finite (with the step; nothing is
            overwritten); a checkpoint of another run, that is damaged or cannot be written; output_dir is in use.
    """
    start_time = time.monotonic()
    needs_weights(model, "finetune")
    if not torch.is_grad_enabled() or any(p.is_inference() for p in model.parameters()):
        raise FFMergeError(
            "finetune: no gradients here (torch.no_grad, or a model made inside of torch.inference_mode): call it, and "
            "make the model, outside of them"
        )
    if clone is not None and (teacher is None or loss_fn is not None):
        raise FFMergeError("clone: got one without a teacher=, or with a loss_fn=; give the base as the teacher")
    if lr is not None:
        overrides["lr"] = lr
    settings = changed(settings or TrainingSettings(), overrides, others=finetune.__kwdefaults__)
    settings = settings.of_run(steps, distributed.world_size())
    if settings.eval_every and evaluate is None:
        evaluate, settings = _task_score(train, settings)
    if settings.parallel == "fsdp2" and isinstance(optimizer, torch.optim.Optimizer):
        raise FFMergeError(
            "parallel: fsdp2 makes parameters anew, which a given optimizer= does not see; give a function that makes "
            "it, or use 'ddp'"
        )
    masters = half_weights(model) if optimizer is None else {}
    if settings.autocast is None:
        settings = replace(settings, autocast=autocast_of(masters, device_of(model)))
    decide = settings.signature(teacher is not None, clone is not None, distributed.world_size())
    if output_dir is not None:
        decide |= _of_data(train) | _of_weights(model, teacher) | dict(signature or {})
    with float32_weights(model, masters):
        wrapped = parallelize(model, settings.parallel)
        if optimizer is None:
            optimizer = _adamw(model, settings)
        else:
            optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer()
            decide |= getattr(optimizer, "settings", {})
        decide = distributed.from_rank_zero(decide | {"optimizer": type(optimizer).__name__, "model": _layout(model)})
        with RunFolder(output_dir, decide, bool(settings.higher_is_better), settings.restore_best) as folder:
            run = TrainingRun(model, wrapped, train, settings, folder, optimizer, teacher, loss_fn, clone)
            run.resume(masters)
            with _training(model, teacher), DeferredInterrupt() as interrupt:
                run.train(steps, evaluate, log, interrupt)
                if settings.restore_best:
                    folder.restore_best_(model)
    return FinetuneResult(folder.history, folder.best_metric, folder.best_step, run.step, time.monotonic() - start_time)


@contextlib.contextmanager
def _training(model: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Model in training mode and teacher in evaluation mode inside; the modes as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    with without_cache(model), evaluating(teacher) if teacher is not None else contextlib.nullcontext():
        model.train()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def _adamw(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW over every trained parameter once (`parameters()` lists a shared one once)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise FFMergeError("model: no parameter requires a gradient; call model.requires_grad_(True) or thaw some")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps)


def _task_score(train: Any, settings: TrainingSettings) -> tuple[Callable[[nn.Module], float], TrainingSettings]:
    if "validation" not in getattr(train, "splits", ()):
        raise FFMergeError("evaluate: eval_every is given, but neither evaluate= nor a Task with validation data")
    if settings.higher_is_better is None:
        settings = replace(settings, higher_is_better=train.higher_is_better)
    return train.score, settings


def _of_data(train: Any) -> dict[str, Any]:
    """What can be said of the data before it has streamed."""
    if hasattr(train, "signature"):
        return train.signature()
    if isinstance(train, Sequence):
        return {"data": content_hash(len(train), [train[i] for i in range(min(len(train), _BATCHES))])}
    return {"data": None}


def _of_weights(model: nn.Module, teacher: nn.Module | None) -> dict[str, Any]:
    return {"weights": weights_hash(model), "teacher": None if teacher is None else weights_hash(teacher)}


def _layout(model: nn.Module) -> str:
    """Short hash of the trained parameters' names and shapes."""
    names = [(name, list(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    return hashlib.sha256(repr(names).encode()).hexdigest()[:16]
