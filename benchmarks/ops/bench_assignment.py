"""Score matrix to the best permutation: ours, scipy, lap or lapx.

`pytest benchmarks/ops/bench_assignment.py`: a group per small case; every result is checked before it is timed.
`python -m benchmarks.ops.bench_assignment`: the table of all kinds and sizes on one thread, certificate included, and
pairs shared among two threads; adds its rows to benchmarks/results/<machine>.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

import ffmerge_fast as ff
from benchmarks import run
from benchmarks.harness.small import small_jobs, time_candidate
from benchmarks.ops import Case, Job
from benchmarks.ops.assignment import assignment_case, ffn_correlation

CANDIDATES = ["ffmerge", "scipy"]

KINDS = ["noise", "random", "ffn", "dead ffn", "ties", "binary"]
SIZES = [768, 1536, 3072, 5120]
GPT2 = Path(__file__).resolve().parents[3] / "shared" / "models" / "gpt2-pystdlib"


job = small_jobs("assignment")


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_assignment(benchmark, job, candidate):
    time_candidate(benchmark, job, candidate)


def lap_peers() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """lap or lapx, whichever is installed: both are the module `lap`, so a run has one of them.

    Raises:
        ImportError: neither is installed.
    """
    import lap

    def lapjv(scores: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(lap.lapjv(np.negative(scores.numpy()))[1].astype(np.int64))

    def lapjvr(scores: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(lap.lapjvr(np.negative(scores.numpy()))[2].astype(np.int64))

    if hasattr(lap, "lapjvr"):
        return {"lapx lapjv": lapjv, "lapx lapjvr": lapjvr}  # lapjvr is its fastest on correlations
    return {"lap lapjv": lapjv}


def real_correlation(kind: str, width: int) -> torch.Tensor:
    """Correlations of two neighbouring layers of the small GPT-2 beside the repository."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(GPT2)((GPT2 / "eval.txt").read_text(), return_tensors="pt").input_ids[0]
    batches = [{"input_ids": block} for block in tokens[: 80 * 128].view(-1, 8, 128)]
    return ff.collect(AutoModelForCausalLM.from_pretrained(GPT2), batches, pairs=[(3, 4)]).correlation(3, 4)


def pairs_case(width: int, pairs: int = 4) -> Case:
    """A batch of matrices on two threads and on one, by wall time: only an idle machine shows the speedup."""

    def build(device: str) -> Job:
        scores = ffn_correlation(width)
        generator = torch.Generator().manual_seed(0)
        batch = torch.stack([scores[torch.randperm(width, generator=generator)] for _ in range(pairs)])
        exact = ff.ops.assign(scores).objective

        def on(threads: int) -> ff.ops.Assignment:
            torch.set_num_threads(threads)
            result = ff.ops.assign(batch)
            torch.set_num_threads(2)  # tells the clock that there are others
            return result

        def error(result: ff.ops.Assignment) -> float:
            return max(abs(objective - exact) / abs(exact) for objective in result.objective)

        return Job({"ffmerge": lambda: on(2), "ffmerge, one thread": lambda: on(1)}, error, limit=1e-9)

    return Case("assignment", f"{pairs} pairs ffn d{width}, two threads", "full", build)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.bench_assignment", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--large", action="store_true", help="8192 as well (ffn only; scipy takes half a minute a run)")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV file; default benchmarks/results/<machine>.csv")
    return parser.parse_args(argv)


def cases(args: argparse.Namespace) -> list[Case]:
    """One-thread cases: kinds by sizes, the real model where it is, 8192 by flag."""
    try:
        peers = lap_peers()
    except ImportError as error:
        print(f"# no peer lap or lapx: {error}")
        peers = {}
    made = [assignment_case("full", kind, d, peers=peers) for d in args.sizes for kind in args.kinds]
    if args.large:
        made.append(assignment_case("full", "ffn", 8192, peers=peers))
    if GPT2.is_dir():
        made.append(assignment_case("full", "gpt2 layers 3, 4", 512, real_correlation, peers))
    else:
        print(f"# no case of real layers: {GPT2} does not exist")
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit 1 where a result was wrong."""
    args = parse(argv)
    versions = {name: version(name) for name in ("lap", "lapx")}
    red = 0
    for threads in args.threads:
        torch.set_num_threads(threads)
        todo = cases(args) if threads == 1 else [pairs_case(d) for d in args.sizes if d <= 3072]
        red |= run.time_cases(todo, args, versions)
    return red


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    sys.exit(main())
