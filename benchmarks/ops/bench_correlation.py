"""Features of layers to their correlations: ours, what one would write with torch in fp32 and bf16, the published loop.

`pytest benchmarks/ops/bench_correlation.py`: a group per small case; every result is checked before it is timed.
`python -m benchmarks.ops.bench_correlation`: narrow layers, where fixed costs show, in streams of 16384 tokens, one
thread; adds its rows to benchmarks/results/<machine>.csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.harness.small import small_jobs, time_candidate
from benchmarks.ops import Case, Job
from benchmarks.ops.correlation import ACCURATE, ROUNDED, correlation_addmm, correlation_ffmerge, features, two_pass

CANDIDATES = list(ACCURATE | ROUNDED)
STREAM = 16384  # tokens


job = small_jobs("correlation")


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_correlation(benchmark, job, candidate):
    time_candidate(benchmark, job, candidate)


def stream_case(width: int, tokens: int, dtype: torch.dtype) -> Case:
    """One pair, `tokens` a batch. "addmm_ alone" stops at Σ xᵀy, without the sums a correlation needs as well."""
    batches, pairs = STREAM // tokens, [(0, 1)]

    def build(device: str) -> Job:
        data = features(2, batches, tokens, width, dtype, device)
        truth = two_pass(data, pairs, None, torch.float64)[0, 1]
        a, b = (torch.cat([batch[i] for batch in data]).double() for i in (0, 1))
        means, scale = torch.outer(a.mean(0), b.mean(0)), torch.outer(a.std(0, False), b.std(0, False))

        def alone() -> torch.Tensor:
            products = torch.zeros(width, width, device=device)
            for batch in data:
                products.addmm_(batch[0].float().T, batch[1].float())
            return products

        def error(result: dict | torch.Tensor) -> float:
            found = result[0, 1] if isinstance(result, dict) else (result / STREAM - means) / scale
            return (found - truth).abs().max().item()

        candidates = {
            "ffmerge": lambda: correlation_ffmerge(data, pairs, None),
            "fp32 addmm_": lambda: correlation_addmm(data, pairs, None),
            "addmm_ alone": alone,
        }
        return Job(candidates, error, limit=1e-5)

    name = f"L2 stream T{batches}x{tokens} d{width} {str(dtype).removeprefix('torch.')}"
    return Case("correlation", name, "full", build)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.bench_correlation", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 384, 512, 768])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output", type=Path, help="CSV file; default benchmarks/results/<machine>.csv")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit 1 where a result was wrong."""
    args = parse(argv)
    torch.set_num_threads(1)
    cases = [
        stream_case(width, tokens, dtype)
        for width in args.widths
        for dtype in (torch.float32, torch.bfloat16)
        for tokens in args.tokens
    ]
    return run.time_cases(cases, args)


if __name__ == "__main__":
    sys.exit(main())
