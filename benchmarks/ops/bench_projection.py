"""W_C and its chain rule, and whole training steps: ours, autograd through P, the published ways, the plain model.

`pytest benchmarks/ops/bench_projection.py`: a group per small case; every result is checked before it is timed.
`python -m benchmarks.run --op projection --size full`: the sizes of real models, with the extra memory of each step.
"""

from __future__ import annotations

import pytest

from benchmarks.harness.small import small_jobs, time_candidate
from benchmarks.studies import projection_step

OF_THE_OP = ["ffmerge", "autograd", "autograd, input first", "autograd in float32"]
CANDIDATES = list(dict.fromkeys([*OF_THE_OP, *projection_step.SIDES]))


job = small_jobs("projection")


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_projection(benchmark, job, candidate):
    time_candidate(benchmark, job, candidate)
