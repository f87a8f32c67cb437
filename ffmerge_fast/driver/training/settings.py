"""What a training run can be told: one list that `finetune`, the resume check and the command line read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...support.errors import FFMergeError
from ...support.settings import documented, option

SCHEDULES = ("inverse_sqrt", "linear", "cosine", "constant")
AUTOCAST = ("bf16", "fp16")
PARALLEL = ("ddp", "fsdp2")
_MAY_CHANGE = (  # on resume
    "eval_every",
    "higher_is_better",
    "restore_best",
    "save_every",
    "resume",
    "fresh",
    "log_every",
)


@documented
@dataclass(frozen=True)
class TrainingSettings:
    """Settings of `finetune`. Those that decide the result must stay as they were when a run is resumed."""

    lr: float = option(5e-5, "highest learning rate", also=["learning_rate"])
    schedule: str = option("inverse_sqrt", "how the learning rate falls after the warmup", SCHEDULES)
    warmup: int = option(0, "steps in which the learning rate rises from 0 to lr")
    lr_end: float = option(0.0, "floor of the linear and cosine schedules")
    decay_steps: int | None = option(None, "steps from lr to lr_end (default: all)")
    timescale: int | None = option(None, "of inverse_sqrt, in steps (default: warmup, or 10000 without one)")
    weight_decay: float = option(0.0, "on matrices only, not on norms and biases")
    betas: tuple[float, float] = option((0.9, 0.999), "decay of AdamW's two moments")
    eps: float = option(1e-8, "of AdamW")
    accumulate: int = option(1, "micro-batches per step", also=["gradient_accumulation_steps"])
    max_grad_norm: float | None = option(1.0, "gradients are scaled down to this norm; None: never")
    autocast: str | None = option(None, "precision of the forward pass; fp16 with loss scaling, on CUDA only", AUTOCAST)
    batch_size: int = option(8, "examples per micro-batch and rank, of a Task", also=["per_device_train_batch_size"])
    seed: int = option(0, "of the order of data, and of torch's, NumPy's and Python's random numbers (dropout)")
    alpha: float = option(0.5, "weight of the distillation loss: (1 - alpha) · loss + alpha · T² · KL(teacher ‖ model)")
    temperature: float = option(1.0, "T of the distillation loss")
    parallel: str | None = option("ddp", "under torchrun; fsdp2 shards in place; None: wrapped already", PARALLEL)
    eval_every: int = option(0, "steps between evaluations (and one at the end); 0: none", also=["eval_steps"])
    higher_is_better: bool | None = option(None, "for the metric (default: the Task's, else False)")
    restore_best: bool = option(False, "give the model the weights of its best evaluation at the end")
    save_every: int = option(0, "steps between checkpoints; one is written at the end anyway", also=["save_steps"])
    resume: bool = option(True, "go on from the checkpoint in output_dir, if there is one")
    fresh: bool = option(False, "begin anew: what an earlier run left in output_dir is removed")
    log_every: int = option(10, "steps between rows of loss, lr, gradient norm and speed", also=["logging_steps"])

    def of_run(self, steps: int, world_size: int) -> TrainingSettings:
        """As a run of so many steps takes them: checked, decay_steps filled in, `parallel` None with one process.

        Raises:
            FFMergeError: a value that no run can have.
        """
        run = replace(self, decay_steps=self.decay_steps or steps)
        run._check_schedule()
        run._check_values(steps)
        if run.decay_steps == steps and run.schedule in ("inverse_sqrt", "constant"):
            run = replace(run, decay_steps=0)  # so that such a run may be made longer
        return run if world_size > 1 else replace(run, parallel=None)

    def signature(self, distils: bool, world_size: int) -> dict[str, Any]:
        """What decides a run's result, and so must not change on resume."""
        decide = {name: value for name, value in asdict(self).items() if name not in _MAY_CHANGE}
        distillation = (decide.pop("alpha"), decide.pop("temperature"))
        return decide | {"distillation": distillation if distils else None, "world_size": world_size}

    def _check_schedule(self) -> None:
        schedule, lr, lr_end = self.schedule, self.lr, self.lr_end
        warmup, decay_steps = self.warmup, self.decay_steps
        if schedule not in SCHEDULES:
            raise FFMergeError(f"schedule: got {schedule!r}, wanted one of {', '.join(SCHEDULES)}")
        if not (lr > 0 and math.isfinite(lr)):
            raise FFMergeError(f"lr: got {lr}, wanted a positive number")
        if warmup < 0:
            raise FFMergeError(f"warmup: got {warmup}, wanted 0 or more steps")
        if schedule in ("linear", "cosine") and (decay_steps <= warmup or not 0 <= lr_end <= lr):
            raise FFMergeError(
                f"schedule {schedule}: got decay_steps {decay_steps}, warmup {warmup}, lr_end {lr_end}; "
                "wanted decay_steps > warmup and 0 <= lr_end <= lr"
            )

    def _check_values(self, steps: int) -> None:
        for name, value, choices in (("autocast", self.autocast, AUTOCAST), ("parallel", self.parallel, PARALLEL)):
            if value not in (None, *choices):
                raise FFMergeError(f"{name}: got {value!r}, wanted {', '.join(map(repr, choices))} or None")
        for name, value, least in (
            ("accumulate", self.accumulate, 1),
            ("batch_size", self.batch_size, 1),
            ("weight_decay", self.weight_decay, 0),
            ("max_grad_norm", self.max_grad_norm or 0, 0),
            ("timescale", self.timescale or 1, 1),
            ("steps", steps, 1),
            ("log_every", self.log_every, 1),
        ):
            if value < least:
                raise FFMergeError(f"{name}: got {value}, wanted at least {least}")
