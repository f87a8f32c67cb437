"""W_C and its chain rule, and whole training steps: ours, autograd through P, the published ways, the plain model.

`pytest benchmarks/bench_projection.py`: a group per small case; every result is checked before it is timed.
`python -m benchmarks.run --op projection --size full`: the sizes of real models, with the extra memory of each step.
"""

from __future__ import annotations

import pytest
import torch

from . import measure, projection_step, registry

CASES = {case.name: case for case in registry.cases("projection", "small")}
OF_THE_OP = ["ffmerge", "autograd", "autograd, input first", "autograd in float32"]
CANDIDATES = list(dict.fromkeys([*OF_THE_OP, *projection_step.SIDES]))


@pytest.fixture(scope="module", params=CASES)
def job(request):
    torch.set_num_threads(1)
    job = CASES[request.param].build("cpu")
    measure.check(job.candidates, job.error, job.limit)
    return request.param, job


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_projection(benchmark, job, candidate):
    case, job = job
    if candidate not in job.candidates:
        pytest.skip(f"{candidate} is no peer of this case")
    benchmark.group = f"projection {case}"
    benchmark(job.candidates[candidate])
