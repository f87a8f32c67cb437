"""What a case is. All its candidates do the whole job, from the same input tensors to the same kind of result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.measure import Candidates

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Job:
    """Candidates on one input, the error of a result, and the error above which no time is taken."""

    candidates: Candidates
    error: Callable[[Any], float]
    limit: float
    memory: Callable[[], dict[str, int]] | None = None  # extra bytes of each candidate at its peak
    nbytes: int = 0  # that no candidate can avoid to read and write; 0 where time is not spent on that


@dataclass(frozen=True)
class Case:
    """One row group of the table. `size`: "small" (seconds), "full" (real models), "large" and "gpu" (GPUs)."""

    op: str
    name: str
    size: str
    build: Callable[[str], Job]  # device -> Job
