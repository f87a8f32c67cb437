"""The training loop: gradients of one large batch over micro-batches and ranks, a step, a log, a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models.forward import evaluating, to_device_and_dtype
from ...projecting.clone import CloneLoss
from ...support import distributed
from ...support.distributed import whole
from ...support.errors import FFMergeError
from ...support.progress import progress
from ...support.tensors import check_weights
from .losses import LossFunction, distillation_loss, label_count, loss_of, teacher_logits
from .parallel import device_of, no_sync, reshard_
from .run_folder import RunFolder
from .schedules import learning_rate
from .settings import TrainingSettings
from .state import seed_all

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast


class TrainingRun:
    """A run and everything that changes from step to step.

    Args:
        model: what is trained, logged and saved.
        wrapped: what is called: the model, or DDP around it.
        train: as `finetune` takes it.
        settings: those of this run (`TrainingSettings.of_run`).
    """

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        train: Any,
        settings: TrainingSettings,
        folder: RunFolder,
        optimizer: torch.optim.Optimizer,
        teacher: nn.Module | None = None,
        loss_fn: LossFunction | None = None,
        clone: CloneLoss | None = None,
    ):
        self.model, self.wrapped, self.data, self.settings = model, wrapped, train, settings
        self.folder, self.optimizer, self.teacher, self.loss_fn, self.clone = folder, optimizer, teacher, loss_fn, clone
        self.step = 0
        self.pending = [0.0, 0]  # loss and steps since the last row
        self.device = device_of(model)
        if settings.autocast == "fp16" and self.device.type != "cuda":
            raise FFMergeError(f"autocast: fp16 needs a CUDA device, the model is on {self.device}; use 'bf16'")
        self.scaler = torch.amp.GradScaler(enabled=settings.autocast == "fp16")

    def resume(self, masters: Mapping[str, torch.dtype]) -> None:
        """Seed, and load the last checkpoint if there is one; `masters` are in these dtypes outside of the run."""
        checkpoint = self.folder.open(self.model, self.settings.resume, self.settings.fresh, masters)
        seed_all(self.settings.seed + distributed.rank())
        if checkpoint is not None:
            state = self.folder.load_(checkpoint, self.model, self.optimizer)
            self.step, self.pending = state["step"], state["pending"]
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])

    def train(
        self,
        steps: int,
        evaluate: Callable[[nn.Module], float] | None,
        log: Callable[[dict[str, Any]], None] | None,
        interrupt: DeferredInterrupt,
    ) -> None:
        """Go on to step `steps`; every row is logged in the folder and given to `log`."""
        if self.step >= steps:
            return
        settings = self.settings
        log = log or (lambda row: None)
        stream = batches_of(self.data, settings, start=self.step * settings.accumulate)
        labels, since = 0, time.monotonic()
        with progress(total=steps, desc="finetune", unit="step") as bar:
            bar.update(self.step)
            while self.step < steps:
                loss, count = self.backward(self.next_batches(stream))
                norm = self.clip()
                self.check_finite(loss, norm)
                self.update()
                self.pending = [self.pending[0] + loss, self.pending[1] + 1]
                labels += count
                bar.update(1)

                last = self.step == steps
                if last or self.step % settings.log_every == 0:
                    speed = labels / max(time.monotonic() - since, 1e-9)
                    row = self.log_training(norm, speed)
                    log(row)
                    bar.set_postfix(loss=f"{row['loss']:.4g}", **{"tokens/s": f"{speed:.3g}"})
                    labels, since = 0, time.monotonic()

                if settings.eval_every and (last or self.step % settings.eval_every == 0):
                    paused = time.monotonic()
                    log(self.evaluate(evaluate))
                    since += time.monotonic() - paused

                stop = distributed.on_any_rank(interrupt.wanted)
                if stop or last or (settings.save_every and self.step % settings.save_every == 0):
                    self.save()
                if stop:
                    raise KeyboardInterrupt(f"stopped after step {self.step}; {self.folder.last_good()}")

    def next_batches(self, stream: Iterator[Any]) -> list[Any]:
        """The micro-batches of one step."""
        batches = list(itertools.islice(stream, self.settings.accumulate))
        if len(batches) < self.settings.accumulate:
            raise FFMergeError(
                f"train: no batches left at step {self.step + 1}; give more data, or a list or Task to go through again"
            )
        return batches

    def backward(self, batches: list[Any]) -> tuple[float, int]:
        """Gradient of the mean loss over all labels of all ranks; returns that loss and the number of labels."""
        counts = [label_count(self.model, batch) for batch in batches]
        total = self.sum_over_ranks(sum(counts))
        if not total:
            raise FFMergeError(f"step {self.step + 1}: the batches hold no labels; give labelled examples")
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else no_sync(self.wrapped):
                loss += self.backward_of_one(to_device_and_dtype(batch, self.model), count, total)
        return self.sum_over_ranks(loss) / total, int(total)

    def backward_of_one(self, batch: Any, count: int, total: float) -> Tensor:
        """Add one micro-batch's part of the gradient of the mean over `total` labels; returns its summed loss."""
        autocast = self.settings.autocast
        with torch.autocast(self.device.type, DTYPES.get(autocast), enabled=autocast is not None):
            loss = self.loss(batch)
        # The mean of a batch without labels is 0/0; its backward pass still has to take part in the gradient exchange.
        loss = loss if count else torch.nan_to_num(loss) * 0
        ranks = distributed.world_size()  # over which DDP and FSDP2 average
        self.scaler.scale(loss * (count * ranks / total)).backward()
        return loss.detach().double() * count

    def loss(self, batch: Any) -> Tensor:
        """(1 - alpha) · loss + alpha · T² · KL(teacher ‖ model) + the clone loss; the loss alone without a teacher."""
        if self.loss_fn is not None:
            return loss_of(self.loss_fn(self.wrapped, batch))
        if not isinstance(batch, Mapping):
            raise FFMergeError(f"train: got a batch of type {type(batch).__name__}, wanted a dict; or give loss_fn=")
        with self.clone.recording(self.model) if self.clone else contextlib.nullcontext():
            output = self.wrapped(**batch)
            loss = loss_of(output)
            if self.teacher is None:
                return loss
            wanted = teacher_logits(self.teacher, batch)
        alpha, temperature = self.settings.alpha, self.settings.temperature
        distilled = distillation_loss(self.model, output.logits, wanted, batch["labels"], temperature)
        loss = (1 - alpha) * loss + alpha * distilled
        return loss + self.settings.clone_weight * self.clone.loss(batch) if self.clone else loss

    def sum_over_ranks(self, value: Tensor | int) -> float:
        value = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        return distributed.sum_over_ranks([value])[0].item()

    def clip(self) -> float:
        """Clip the gradients; returns their norm before."""
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], limit)
        return float(whole(norm))

    def check_finite(self, loss: float, norm: float) -> None:
        """Stop before a broken update; with loss scaling an infinite gradient is ordinary and only skips the step."""
        what = "loss" if not math.isfinite(loss) else "gradient norm"
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
            return
        check_weights(self.model)  # names the tensor where the weights are what is wrong
        value = loss if what == "loss" else norm
        raise FFMergeError(
            f"step {self.step + 1}: the {what} is {value}; {self.folder.last_good()}; try a lower lr, more warmup or "
            "max_grad_norm"
        )

    def update(self) -> None:
        """One optimiser step at this step's learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def log_training(self, norm: float, speed: float) -> dict[str, Any]:
        row = {
            "step": self.step,
            "loss": self.pending[0] / self.pending[1],
            "lr": learning_rate(self.step - 1, self.settings),
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


class DeferredInterrupt:
    """Turns the first Ctrl-C into a wish (`wanted`) that the loop grants between steps; a second one interrupts."""

    def __init__(self):
        self.wanted = False
        self._old: Any = None

    def __enter__(self) -> DeferredInterrupt:
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


def batches_of(train: Any, settings: TrainingSettings, start: int) -> Iterator[Any]:
    """This rank's batches without end, the first `start` left out."""
    rank, world = distributed.rank(), distributed.world_size()
    if hasattr(train, "batches"):
        return train.batches(
            "train", settings.batch_size, shuffle=True, seed=settings.seed, epochs=None, start=start, rank=rank,
            world=world,
        )  # fmt: skip
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
