"""Honest timing: the same work for every candidate, in one run, interleaved, and only after all results were checked.

A shared machine drifts, so candidates take turns (A B C, A B C, ...) and medians are compared. On the CPU the clock is
the calling thread's CPU time with torch on one thread: other processes then cost little. On CUDA it is device time.
"""

from __future__ import annotations

import argparse
import gc
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from typing import Any

import torch

from ffmerge_fast.driver import environment
from ffmerge_fast.support.machine import why_no_gpu

Candidates = dict[str, Callable[[], Any]]


class RedGate(AssertionError):
    """A candidate's result is wrong: its time means nothing and is not taken."""


@dataclass(frozen=True)
class Timing:
    """Times of one candidate in milliseconds, and the error of its result against the float64 reference."""

    median: float
    fastest: float
    slowest: float
    runs: int
    error: float


def check(candidates: Candidates, error: Callable[[Any], float], limit: float) -> dict[str, float]:
    """Run every candidate once (which also warms it up) and return its error.

    Raises:
        RedGate: an error above `limit`, or NaN.
    """
    errors = {name: float(error(run())) for name, run in candidates.items()}
    wrong = [f"{name} {value:.2e}" for name, value in errors.items() if not value <= limit]
    if wrong:
        raise RedGate(f"error above {limit:.2e}: {', '.join(wrong)}")
    return errors


def compare(
    candidates: Candidates,
    error: Callable[[Any], float],
    limit: float,
    device: str = "cpu",
    runs: int = 7,
    max_seconds: float = 20.0,
) -> dict[str, Timing]:
    """Check all results, then time the candidates in turns, `runs` times each.

    Stops earlier, but not below three runs each, once `max_seconds` of wall time have gone.
    """
    errors = check(candidates, error, limit)
    clock = _cuda_ms if device == "cuda" else _cpu_ms
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.monotonic() + max_seconds
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        for turn in range(runs):
            if turn >= 3 and time.monotonic() > end:
                break
            for name, run in candidates.items():
                times[name].append(clock(run))
    finally:
        if gc_was_on:
            gc.enable()
    return {n: Timing(statistics.median(t), min(t), max(t), len(t), errors[n]) for n, t in times.items()}


def _cpu_ms(run: Callable[[], Any]) -> float:
    """CPU time of this thread with one torch thread, else wall time (thread time would miss the others)."""
    now = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    start = now()
    run()
    return (now() - start) / 1e6


def _cuda_ms(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy too large for the caches; the fastest of seven."""
    source = torch.empty(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device).zero_()
    to, clock = torch.empty_like(source), _cuda_ms if device == "cuda" else _cpu_ms
    return 2 * source.nbytes / min(clock(lambda: to.copy_(source)) for _ in range(7)) * 1e3


def machine(device: str = "cpu") -> dict[str, str]:
    """Everything a number depends on besides the code: processor, threads, versions, time."""
    report = environment.report()
    name = torch.cuda.get_device_name() if device == "cuda" else report["cpu"]["name"]
    return {
        "machine": name,
        "device": device,
        "isa": report["cpu"]["isa"],
        "threads": str(torch.get_num_threads()),
        "ffmerge_fast": report["ffmerge_fast"] or "source",
        "torch": torch.__version__,
        "scipy": report["packages"]["scipy"] or "none",
        "triton": report["packages"]["triton"] or "none",
        "python": platform.python_version(),
        "utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M"),
    }


def slug(name: str) -> str:
    """A machine's name as a file name: "AMD EPYC 7B13" -> "amd-epyc-7b13"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(argv: list[str] | None = None) -> int:
    """`--why-no-gpu`: exit 0 where a CUDA device can be used, else print the reason and exit 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.measure")
    parser.add_argument("--why-no-gpu", action="store_true", required=True)
    parser.parse_args(argv)
    reason = why_no_gpu()
    if reason:
        print(reason)
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
