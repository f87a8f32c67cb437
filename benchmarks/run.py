"""Times every case, prints a table and writes benchmarks/results/<machine>.csv."""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import measure, registry
from benchmarks.ops import Case
from ffmerge_fast.support import machine
from ffmerge_fast.support.tables import format_table

RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> int:
    """Exit 1 where a result was wrong (such a case gets no time and no ratio)."""
    args = parse(argv)
    if args.device == "cuda" and (reason := machine.why_no_gpu()):
        print(f"error: --device cuda: {reason}", file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    return time_cases([c for c in registry.cases(args.op, args.size) if args.case in c.name], args)


def time_cases(
    cases: list[Case], args: argparse.Namespace, versions: dict[str, str] | None = None, until: float = math.inf
) -> int:
    """Time the cases with `args.runs`, write each to `args.output` when it is done; 1 where one was wrong or failed.

    Args:
        until: begin none after this moment of `time.monotonic`.
    """
    device = getattr(args, "device", "cpu")
    header = measure.machine(device)
    print("\n".join(f"# {key}: {value}" for key, value in {**header, **(versions or {})}.items()))
    path = args.output or RESULTS / f"{measure.slug(header['machine'])}.csv"
    rows, red = [], 0
    for case in cases:
        if time.monotonic() > until:
            print(f"not run, the time is over: {case.op} {case.name}", file=sys.stderr)
            continue
        try:
            timed = time_case(case, device, args.runs)
        except Exception as error:  # a GPU is lent for minutes: one case must not cost the others
            red += 1
            print(f"RED {case.op} {case.name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        write(path, header, timed)
        rows += timed
    print(table(rows))
    if rows:
        print(f"# written: {path}")
    return 1 if red else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--op", choices=registry.ops(), help="one op only")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--size", choices=("small", "full", "large"), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; above 1 the clock is wall time")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output", type=Path, help="CSV file; default benchmarks/results/<machine>.csv")
    return parser.parse_args(argv)


def time_case(case: Case, device: str, runs: int) -> list[dict]:
    """One row per candidate; `ratio` is its time over ours, so above 1 means that ours is faster."""
    job = case.build(device)
    timings = measure.compare(job.candidates, job.error, job.limit, device, runs)
    ours = timings["ffmerge"].median
    memory = job.memory() if job.memory and device == "cpu" else {}
    return [
        {
            "op": case.op,
            "case": case.name,
            "candidate": name,
            "median_ms": f"{t.median:.3f}",
            "min_ms": f"{t.fastest:.3f}",
            "max_ms": f"{t.slowest:.3f}",
            "ratio": f"{t.median / ours:.2f}",
            "runs": t.runs,
            "error": f"{t.error:.1e}",
            "extra_mib": f"{memory[name] / 2**20:.1f}" if name in memory else "",
            **_bandwidth(job.nbytes, t.median / 1e3, device),
        }
        for name, t in timings.items()
    ]


def _bandwidth(nbytes: int, seconds: float, device: str) -> dict[str, str]:
    """The bytes that cannot be avoided by the time, and beside the machine's copy."""
    if not nbytes:
        return {"gb_s": "", "of_copy": ""}
    rate = nbytes / seconds
    return {"gb_s": f"{rate / 1e9:.1f}", "of_copy": f"{rate / measure.copy_bandwidth(device):.2f}"}


def table(rows: list[dict]) -> str:
    """The rows as text."""
    if not rows:
        return "no case was timed"
    return format_table(list(rows[0]), [list(row.values()) for row in rows])


def write(path: Path, header: dict[str, str], rows: list[dict]) -> None:
    """Replace the rows of the same cases and device in `path`, keep the others: small and full runs share a file."""
    if not rows:
        return
    new = [{**row, **header} for row in rows]
    done = {(row["op"], row["case"], row["device"]) for row in new}
    old = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = [row for row in csv.DictReader(file) if (row["op"], row["case"], row["device"]) not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(new[0]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(old + new)


if __name__ == "__main__":
    sys.exit(main())
