"""Features of layers to their correlations: ours, what one would write with torch in fp32 and bf16, the published loop.

`pytest benchmarks/bench_correlation.py`: a group per small case; every result is checked before it is timed.
"""

from __future__ import annotations

import pytest
import torch

from . import measure, registry

CASES = {case.name: case for case in registry.cases("correlation", "small")}
CANDIDATES = list(registry.ACCURATE | registry.ROUNDED)


@pytest.fixture(scope="module", params=CASES)
def job(request):
    torch.set_num_threads(1)
    job = CASES[request.param].build("cpu")
    measure.check(job.candidates, job.error, job.limit)
    return request.param, job


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_correlation(benchmark, job, candidate):
    case, job = job
    if candidate not in job.candidates:
        pytest.skip(f"{candidate} is no peer of this case")
    benchmark.group = f"correlation {case}"
    benchmark(job.candidates[candidate])
