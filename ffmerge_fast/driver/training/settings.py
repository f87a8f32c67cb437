"""What a training run can be told: one list that `finetune`, the resume check and the command line read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ...support.errors import FFMergeError
from ...support.settings import Range, check, documented, option

SCHEDULES = ("inverse_sqrt", "linear", "cosine", "constant")
AUTOCAST = ("bf16", "fp16")
PARALLEL = ("ddp", "fsdp2")
STEPS = Range(at_least=1)  # of a run
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

    lr: float = option(5e-5, "highest learning rate", also=["learning_rate"], more_than=0, at_most=1000)
    schedule: str = option("inverse_sqrt", "how the learning rate falls after the warmup", SCHEDULES)
    warmup: int = option(0, "steps in which the learning rate rises from 0 to lr", at_least=0)
    lr_end: float = option(0.0, "floor of the linear and cosine schedules", at_least=0)
    decay_steps: int | None = option(None, "steps from lr to lr_end (default: all)", at_least=1)
    timescale: int | None = option(
        None, "of inverse_sqrt, in steps (default: warmup, or 10000 without one)", at_least=1
    )
    weight_decay: float = option(0.0, "on matrices only, not on norms and biases", at_least=0, at_most=1000)
    betas: tuple[float, float] = option((0.9, 0.999), "decay of AdamW's two moments")
    eps: float = option(1e-8, "of AdamW", more_than=0)
    accumulate: int = option(1, "micro-batches per step", also=["gradient_accumulation_steps"], at_least=1)
    max_grad_norm: float | None = option(1.0, "gradients are scaled down to this norm; None: never", at_least=0)
    autocast: str | None = option(None, "precision of the forward pass; fp16 with loss scaling, on CUDA only", AUTOCAST)
    batch_size: int = option(
        8, "examples per micro-batch and rank, of a Task", also=["per_device_train_batch_size"], at_least=1
    )
    seed: int = option(
        0, "of the order of data, and of torch's, NumPy's and Python's random numbers (dropout)", at_least=0
    )
    alpha: float = option(
        0.5,
        "weight of the distillation loss: (1 - alpha) · loss + alpha · T² · KL(teacher ‖ model)",
        at_least=0,
        at_most=1,
    )
    temperature: float = option(1.0, "T of the distillation loss", more_than=0)
    clone_weight: float = option(1.0, "of the clone loss, which is added where clone= is given", at_least=0)
    parallel: str | None = option("ddp", "under torchrun; fsdp2 shards in place; None: wrapped already", PARALLEL)
    eval_every: int = option(
        0, "steps between evaluations (and one at the end); 0: none", also=["eval_steps"], at_least=0
    )
    higher_is_better: bool | None = option(None, "for the metric (default: the Task's, else False)")
    restore_best: bool = option(False, "give the model the weights of its best evaluation at the end")
    save_every: int = option(
        0, "steps between checkpoints; one is written at the end anyway", also=["save_steps"], at_least=0
    )
    resume: bool = option(True, "go on from the checkpoint in output_dir, if there is one")
    fresh: bool = option(False, "begin anew: what an earlier run left in output_dir is removed")
    log_every: int = option(
        10, "steps between rows of loss, lr, gradient norm and speed", also=["logging_steps"], at_least=1
    )

    def of_run(self, steps: int, world_size: int) -> TrainingSettings:
        """As a run of so many steps takes them: checked, decay_steps filled in, `parallel` None with one process.

        Raises:
            FFMergeError: a value that no run can have.
        """
        check(self)
        if steps not in STEPS:
            raise FFMergeError(f"steps: got {steps}, wanted {STEPS}")
        run = replace(self, decay_steps=self.decay_steps or steps)
        if run.schedule in ("linear", "cosine") and not (run.warmup < run.decay_steps and run.lr_end <= run.lr):
            raise FFMergeError(
                f"schedule {run.schedule}: got decay_steps {run.decay_steps}, warmup {run.warmup}, lr_end {run.lr_end};"
                " wanted decay_steps > warmup and 0 <= lr_end <= lr"
            )
        if run.decay_steps == steps and run.schedule in ("inverse_sqrt", "constant"):
            run = replace(run, decay_steps=0)  # so that such a run may be made longer
        return run if world_size > 1 else replace(run, parallel=None)

    def signature(self, distils: bool, clones: bool, world_size: int) -> dict[str, Any]:
        """What decides a run's result, and so must not change on resume."""
        decide = {name: value for name, value in asdict(self).items() if name not in _MAY_CHANGE}
        distillation = (decide.pop("alpha"), decide.pop("temperature"))
        weight = decide.pop("clone_weight")
        return (
            decide
            | {"clone": weight if clones else None}
            | {"distillation": distillation if distils else None, "world_size": world_size}
        )
