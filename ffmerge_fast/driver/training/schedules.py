"""Learning rates as closed forms of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from ...support.errors import FFMergeError

SCHEDULES = ("inverse_sqrt", "linear", "cosine", "constant")


def learning_rate(
    step: int,
    *,
    schedule: str = "inverse_sqrt",
    lr: float,
    warmup: int = 0,
    lr_end: float = 0.0,
    decay_steps: int = 0,
    timescale: int | None = None,
) -> float:
    """Learning rate of the update number `step` (from 0). All schedules rise linearly from 0 to `lr` over `warmup`.

    - "inverse_sqrt": lr / sqrt((step + shift) / timescale), shift = timescale - warmup; timescale defaults to `warmup`,
      or 10,000 without one (as in transformers; the papers' language models and translation).
    - "linear": in a straight line to `lr_end` at `decay_steps`, constant from there (the papers' vision models:
      5e-5 to 1e-6 over 20,000).
    - "cosine": in half a cosine to `lr_end` at `decay_steps`, constant from there.
    - "constant": `lr`.
    """
    if step < warmup:
        return lr * step / warmup
    if schedule == "constant":
        return lr
    if schedule == "inverse_sqrt":
        timescale = timescale or warmup or 10_000
        return lr / math.sqrt((step + timescale - warmup) / timescale)
    done = min(1.0, (step - warmup) / max(1, decay_steps - warmup))
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return lr_end + (lr - lr_end) * left


def check_schedule(schedule: str, lr: float, warmup: int, lr_end: float, decay_steps: int) -> None:
    """Raise FFMergeError for values `learning_rate` cannot use."""
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
