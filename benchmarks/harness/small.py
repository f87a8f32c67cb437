"""The small cases of an op under pytest-benchmark: a group for each case, every result checked before it is timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import measure, registry
from benchmarks.ops import Case, Job


def small_jobs(op: str):
    """A module's fixture that gives (case, job) of each small case of an op."""

    @pytest.fixture(scope="module", params=registry.cases(op, "small"), ids=lambda case: case.name)
    def job(request) -> tuple[Case, Job]:
        torch.set_num_threads(1)
        job = request.param.build("cpu")
        measure.check(job.candidates, job.error, job.limit)
        return request.param, job

    return job


def time_candidate(benchmark, job: tuple[Case, Job], candidate: str) -> None:
    """Time one candidate of a job, where it is one."""
    case, job = job
    if candidate not in job.candidates:
        pytest.skip(f"{candidate} is no peer of this case")
    benchmark.group = f"{case.op} {case.name}"
    benchmark(job.candidates[candidate])
