"""Fine-tuning: a plain AdamW loop that keeps ties, resumes exactly and runs under torchrun."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...models.forward import evaluating
from ...support import distributed
from ...support.distributed import whole
from ...support.errors import FFMergeError
from ...support.progress import progress
from . import state as training_state
from .losses import LossFunction, distillation_loss, label_count, loss_of, on_device, teacher_logits, without_cache
from .parallel import check_parallel, device_of, no_sync, parallelize, reshard_
from .run_folder import RunFolder
from .schedules import check_schedule, learning_rate

_AUTOCAST = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did. `history`: the rows of log.jsonl, among them those before a resume."""

    history: list[dict[str, Any]] = field(repr=False)
    best_metric: float | None
    best_step: int | None
    steps: int
    seconds: float


@dataclass(frozen=True)
class _Recipe:
    """The settings that decide the result, and so must not change on resume."""

    lr: float
    schedule: str
    warmup: int
    lr_end: float
    decay_steps: int
    timescale: int | None
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    accumulate: int
    max_grad_norm: float | None
    autocast: str | None
    batch_size: int
    seed: int
    distillation: tuple[float, float] | None  # alpha, temperature
    parallel: str | None
    world_size: int

    def check(self) -> None:
        check_schedule(self.schedule, self.lr, self.warmup, self.lr_end, self.decay_steps)
        if self.autocast not in _AUTOCAST:
            raise FFMergeError(f"autocast: got {self.autocast!r}, wanted 'bf16', 'fp16' or None")
        for name, value, least in (
            ("accumulate", self.accumulate, 1),
            ("batch_size", self.batch_size, 1),
            ("weight_decay", self.weight_decay, 0),
            ("max_grad_norm", self.max_grad_norm or 0, 0),
            ("timescale", self.timescale or 1, 1),
        ):
            if value < least:
                raise FFMergeError(f"{name}: got {value}, wanted at least {least}")

    def learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            schedule=self.schedule,
            lr=self.lr,
            warmup=self.warmup,
            lr_end=self.lr_end,
            decay_steps=self.decay_steps,
            timescale=self.timescale,
        )


def finetune(
    model: nn.Module,
    train: Any,
    steps: int,
    lr: float = 5e-5,
    *,
    batch_size: int = 8,
    schedule: str = "inverse_sqrt",
    warmup: int = 0,
    lr_end: float = 0.0,
    decay_steps: int | None = None,
    timescale: int | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    accumulate: int = 1,
    max_grad_norm: float | None = 1.0,
    autocast: str | None = None,
    optimizer: torch.optim.Optimizer | Callable[[], torch.optim.Optimizer] | None = None,
    teacher: nn.Module | None = None,
    alpha: float = 0.5,
    temperature: float = 1.0,
    loss_fn: LossFunction | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    eval_every: int = 0,
    higher_is_better: bool | None = None,
    restore_best: bool = False,
    output_dir: str | os.PathLike | None = None,
    save_every: int = 0,
    resume: bool = True,
    parallel: str | None = "ddp",
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    log_every: int = 10,
) -> FinetuneResult:
    """Train a model in place with AdamW. Shared weights have one optimiser state and the sum of their gradients.

    Ties are kept: parameters are changed in place. A run killed at any time goes on from its last checkpoint and
    gives bit for bit what it would have given, if `train` is a `Task`, a sequence or a function, and the machine is
    the same. Ctrl-C finishes the step, saves, and raises KeyboardInterrupt.

    Args:
        model: its forward returns an object with `.loss` for a batch; otherwise give `loss_fn`.
        train: a `Task` (see `load_task`), whose "train" batches are taken; a sequence or re-iterable of batches, gone
            through again and again; or a function of the number of batches to pass over that returns an iterator.
            Batches are dicts. With several ranks, each takes every world-th batch (a function must do so itself).
        steps: optimiser steps in total, those before a resume included.
        lr, schedule, warmup, lr_end, decay_steps, timescale: see `schedules.learning_rate`; decay_steps defaults to
            `steps`.
        batch_size: examples per micro-batch and rank, if `train` is a Task.
        weight_decay: on matrices only, not on norms and biases.
        accumulate: micro-batches per step. Their mean is weighted by label counts, also over ranks: the gradient is
            that of one large batch.
        max_grad_norm: gradients are scaled down to this norm; None: never.
        autocast: "bf16", or "fp16" with loss scaling (CUDA only).
        optimizer: instead of AdamW, one made for this model's parameters (`Projector.optimizer`), or a function that
            makes it, called when the model is sharded. The schedule sets its lr; weight decay, betas and eps are its
            own, those given here are not used.
        teacher: distils from this model: (1 - alpha) · loss + alpha · T² · KL(teacher ‖ model).
        loss_fn: `loss_fn(model, batch)` -> scalar mean loss, instead of `model(**batch).loss`.
        evaluate: `evaluate(model)` -> metric; default for a Task with validation data: its `score`.
        eval_every: steps between evaluations (and one at the end); 0: none.
        higher_is_better: for the metric; default the Task's, else False.
        restore_best: give the model the weights of its best evaluation at the end.
        output_dir: folder for log.jsonl, the last checkpoint and the best weights.
        save_every: steps between checkpoints; one is written at the end in any case.
        resume: go on from the checkpoint in `output_dir`, if there is one.
        parallel: with torch.distributed up: "ddp", "fsdp2" (shards the model in place), or None (wrapped already).
        seed: of the order of data, and of torch's, NumPy's and Python's random numbers (dropout).
        log: called with every row of the log.
        log_every: steps between rows of loss, learning rate, gradient norm and labels (tokens, images) per second.

    Raises:
        FFMergeError: a bad argument; no data; a loss or gradient that is not finite (with the step; nothing is
            overwritten); a checkpoint of other settings or that cannot be written.
    """
    start_time = time.monotonic()
    recipe = _Recipe(
        lr, schedule, warmup, lr_end, decay_steps or steps, timescale, weight_decay, tuple(betas), eps, accumulate,
        max_grad_norm, autocast, batch_size, seed, (alpha, temperature) if teacher is not None else None,
        parallel if distributed.is_distributed() else None, distributed.world_size(),
    )  # fmt: skip
    recipe.check()
    check_parallel(parallel)
    for name, value in (("steps", steps), ("log_every", log_every)):
        if value < 1:
            raise FFMergeError(f"{name}: got {value}, wanted at least 1")
    if recipe.decay_steps == steps and schedule in ("inverse_sqrt", "constant"):
        recipe = replace(recipe, decay_steps=0)  # so that such a run may be made longer
    if eval_every and evaluate is None:
        evaluate, higher_is_better = _task_score(train, higher_is_better)
    if recipe.parallel == "fsdp2" and isinstance(optimizer, torch.optim.Optimizer):
        raise FFMergeError(
            "parallel: fsdp2 makes parameters anew, which a given optimizer= does not see; give a function that makes "
            "it, or use 'ddp'"
        )
    settings = asdict(recipe)
    wrapped = parallelize(model, recipe.parallel)
    if optimizer is not None:
        optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer()
        settings |= {"optimizer": type(optimizer).__name__, **getattr(optimizer, "settings", {})}
    settings |= {"model": _layout(model)}
    folder = RunFolder(output_dir, settings, bool(higher_is_better), keep_best=restore_best)
    run = _Run(model, wrapped, train, recipe, folder, teacher, loss_fn, optimizer or _optimizer(model, recipe))
    run.prepare(resume)
    with _training(model, teacher), _DeferredInterrupt() as interrupt:
        for row in run.rows(steps, log_every, evaluate, eval_every, save_every, interrupt):
            if log:
                log(row)
        if restore_best:
            folder.restore_best_(model)
    return FinetuneResult(folder.history, folder.best_metric, folder.best_step, run.step, time.monotonic() - start_time)


class _Run:
    """One training run: everything that changes from step to step."""

    def __init__(self, model, wrapped, train, recipe: _Recipe, folder: RunFolder, teacher, loss_fn, optimizer):
        self.model, self.wrapped, self.train, self.recipe, self.folder = model, wrapped, train, recipe, folder
        self.optimizer = optimizer
        self.teacher, self.loss_fn = teacher, loss_fn
        self.step = 0
        self.device = device_of(model)
        if recipe.autocast == "fp16" and self.device.type != "cuda":
            raise FFMergeError(f"autocast: fp16 needs a CUDA device, the model is on {self.device}; use 'bf16'")
        self.scaler = torch.amp.GradScaler(enabled=recipe.autocast == "fp16")
        self.pending = [0.0, 0]  # loss and steps since the last row

    def prepare(self, resume: bool) -> None:
        """Load the last checkpoint if there is one."""
        checkpoint = self.folder.open(resume)
        training_state.seed_all(self.recipe.seed + distributed.rank())
        if checkpoint is not None:
            state = self.folder.load_(checkpoint, self.model, self.optimizer)
            self.step, self.pending = state["step"], state["pending"]
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])

    def rows(self, steps, log_every, evaluate, eval_every, save_every, interrupt) -> Iterator[dict[str, Any]]:
        """Train up to `steps`; yields every row as it is logged."""
        if self.step >= steps:
            return
        stream = _stream(self.train, self.recipe, self.step * self.recipe.accumulate)
        bar = progress(total=steps, desc="finetune", unit="step")
        bar.update(self.step)
        labels, since = 0, time.monotonic()
        try:
            while self.step < steps:
                loss, norm, count = self.update(stream)
                self.pending = [self.pending[0] + loss, self.pending[1] + 1]
                labels += count
                bar.update(1)
                if self.step % log_every == 0 or self.step == steps:
                    speed = labels / max(time.monotonic() - since, 1e-9)
                    yield self.log_training(norm, speed)
                    bar.set_postfix(loss=f"{self.folder.history[-1]['loss']:.4g}", **{"tokens/s": f"{speed:.3g}"})
                    labels, since = 0, time.monotonic()
                if eval_every and (self.step % eval_every == 0 or self.step == steps):
                    paused = time.monotonic()
                    yield self.evaluate(evaluate)
                    since += time.monotonic() - paused
                stop = distributed.on_any_rank(interrupt.wanted)
                if stop or self.step == steps or (save_every and self.step % save_every == 0):
                    self.save()
                if stop:
                    raise KeyboardInterrupt(f"stopped after step {self.step}; {self.folder.last_good()}")
        finally:
            bar.close()

    def update(self, stream: Iterator[Any]) -> tuple[float, float, int]:
        """One optimiser step; returns the mean loss, the gradient norm and the number of labels, of all ranks."""
        batches = self.take(stream)
        counts = [label_count(self.model, batch) for batch in batches]
        total = distributed.sum_over_ranks([torch.tensor(sum(counts), dtype=torch.float64, device=self.device)])[
            0
        ].item()
        if not total:
            raise FFMergeError(f"step {self.step + 1}: the batches hold no labels; give labelled examples")
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else no_sync(self.wrapped):
                loss += self.backward(on_device(batch, self.model), count, total)
        loss = float(distributed.sum_over_ranks([loss])[0]) / total
        norm = self.clip()
        self.check_finite(loss, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, norm, int(total)

    def take(self, stream: Iterator[Any]) -> list[Any]:
        """The micro-batches of one step."""
        batches = list(itertools.islice(stream, self.recipe.accumulate))
        if len(batches) < self.recipe.accumulate:
            raise FFMergeError(
                f"train: no batches left at step {self.step + 1}; give more data, or a list or Task to go through again"
            )
        return batches

    def backward(self, batch: Any, count: int, total: float) -> Tensor:
        """Add one micro-batch's part of the gradient of the mean over `total` labels; returns its summed loss."""
        with torch.autocast(
            self.device.type, _AUTOCAST[self.recipe.autocast], enabled=self.recipe.autocast is not None
        ):
            loss = self.loss(batch)
        # The mean of a batch without labels is 0/0; its backward pass still has to take part in the gradient exchange.
        loss = loss if count else torch.nan_to_num(loss) * 0
        ranks = self.recipe.world_size  # over which DDP and FSDP2 average
        self.scaler.scale(loss * (count * ranks / total)).backward()
        return loss.detach().double() * count

    def loss(self, batch: Any) -> Tensor:
        if self.loss_fn is not None:
            return loss_of(self.loss_fn(self.wrapped, batch))
        if not isinstance(batch, Mapping):
            raise FFMergeError(f"train: got a batch of type {type(batch).__name__}, wanted a dict; or give loss_fn=")
        output = self.wrapped(**batch)
        loss = loss_of(output)
        if self.teacher is None:
            return loss
        alpha, temperature = self.recipe.distillation
        wanted = teacher_logits(self.teacher, batch)
        distilled = distillation_loss(self.model, output.logits, wanted, batch["labels"], temperature)
        return (1 - alpha) * loss + alpha * distilled

    def clip(self) -> float:
        """Clip the gradients; returns their norm before."""
        self.scaler.unscale_(self.optimizer)
        limit = self.recipe.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], limit)
        return float(whole(norm))

    def check_finite(self, loss: float, norm: float) -> None:
        """Stop before a broken update; with loss scaling an infinite gradient is ordinary and only skips the step."""
        what = "loss" if not math.isfinite(loss) else "gradient norm"
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
            return
        value = loss if what == "loss" else norm
        raise FFMergeError(
            f"step {self.step + 1}: the {what} is {value}; {self.folder.last_good()}; try a lower lr, more warmup or "
            "max_grad_norm"
        )

    def log_training(self, norm: float, speed: float) -> dict[str, Any]:
        row = {
            "step": self.step,
            "loss": self.pending[0] / self.pending[1],
            "lr": self.recipe.learning_rate(self.step - 1),
            "grad_norm": norm,
            "tokens_per_second": round(speed, 1),
        }
        self.pending = [0.0, 0]
        self.folder.log(row)
        return row

    def evaluate(self, evaluate: Callable[[nn.Module], float]) -> dict[str, Any]:
        with torch.no_grad(), evaluating(self.model):
            metric = distributed.from_rank_zero(float(evaluate(self.model)))
        reshard_(self.model)
        best = self.folder.offer(self.model, self.step, metric)
        row = {"step": self.step, "metric": metric, "best": best}
        self.folder.log(row)
        return row

    def save(self) -> None:
        scaler = self.scaler.state_dict()
        self.folder.save(self.model, self.optimizer, {"step": self.step, "pending": self.pending, "scaler": scaler})


class _DeferredInterrupt:
    """Turns the first Ctrl-C into a wish (`wanted`) that the loop grants between steps; a second one interrupts."""

    def __init__(self):
        self.wanted = False
        self._old: Any = None

    def __enter__(self) -> _DeferredInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)

    def _handle(self, signum, frame) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


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


def _optimizer(model: nn.Module, recipe: _Recipe) -> torch.optim.AdamW:
    """AdamW over every trained parameter once (`parameters()` lists a shared one once)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise FFMergeError("model: no parameter requires a gradient; call model.requires_grad_(True) or thaw some")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)


def _stream(train: Any, recipe: _Recipe, start: int) -> Iterator[Any]:
    """This rank's batches without end, the first `start` left out."""
    rank, world = distributed.rank(), recipe.world_size
    if hasattr(train, "batches"):
        return train.batches(
            "train", recipe.batch_size, shuffle=True, seed=recipe.seed, epochs=None, start=start, rank=rank, world=world
        )
    if callable(train):
        return iter(train(start))
    first = start * world + rank
    if isinstance(train, Sequence):
        if not train:
            raise FFMergeError("train: got no batches, wanted at least one")
        return (train[i % len(train)] for i in itertools.count(first, world))
    if iter(train) is train:
        return itertools.islice(train, first, None, world)
    return itertools.islice(_again_and_again(train), first, None, world)


def _again_and_again(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise FFMergeError("train: got no batches, wanted at least one")


def _task_score(train: Any, higher_is_better: bool | None) -> tuple[Callable[[nn.Module], float], bool]:
    if "validation" not in getattr(train, "splits", ()):
        raise FFMergeError("evaluate: eval_every is given, but neither evaluate= nor a Task with validation data")
    return train.score, train.higher_is_better if higher_is_better is None else higher_is_better


def _layout(model: nn.Module) -> str:
    """Short hash of the trained parameters' names and shapes."""
    names = [(name, list(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    return hashlib.sha256(repr(names).encode()).hexdigest()[:16]
