"""Learning rates as closed forms of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from .settings import TrainingSettings


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Learning rate of the update number `step` (from 0). All schedules rise linearly from 0 to `lr` over `warmup`.

    - "inverse_sqrt": lr / sqrt((step + shift) / timescale), shift = timescale - warmup; timescale defaults to `warmup`,
      or 10,000 without one (as in transformers; the papers' language models and translation).
    - "linear": in a straight line to `lr_end` at `decay_steps`, constant from there (the papers' vision models:
      5e-5 to 1e-6 over 20,000).
    - "cosine": in half a cosine to `lr_end` at `decay_steps`, constant from there.
    - "constant": `lr`.
    """
    lr, warmup = settings.lr, settings.warmup
    if step < warmup:
        return lr * step / warmup
    if settings.schedule == "constant":
        return lr
    if settings.schedule == "inverse_sqrt":
        timescale = settings.timescale or warmup or 10_000
        return lr / math.sqrt((step + timescale - warmup) / timescale)
    done = min(1.0, (step - warmup) / max(1, settings.decay_steps - warmup))
    left = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.lr_end + (lr - settings.lr_end) * left
