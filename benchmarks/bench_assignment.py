"""Score matrix to the best permutation: ours and scipy.

`pytest benchmarks/bench_assignment.py`: a group per small case; every result is checked before it is timed.
"""

from __future__ import annotations

import pytest
import torch

from . import measure, registry

CASES = {case.name: case for case in registry.cases("assignment", "small")}
CANDIDATES = ["ffmerge", "scipy"]


@pytest.fixture(scope="module", params=CASES)
def job(request):
    torch.set_num_threads(1)
    job = CASES[request.param].build("cpu")
    measure.check(job.candidates, job.error, job.limit)
    return request.param, job


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_assignment(benchmark, job, candidate):
    case, job = job
    benchmark.group = f"assignment {case}"
    benchmark(job.candidates[candidate])
