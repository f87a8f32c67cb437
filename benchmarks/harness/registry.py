"""What is timed: per op, its cases and candidates. Ours is called "ffmerge", the others are its peers."""

from __future__ import annotations

from benchmarks.ops import Case, assignment, correlation, projection, shared_ffn

CASES = [*correlation.CASES, *assignment.CASES, *projection.CASES, *shared_ffn.CASES]


def cases(op: str | None = None, size: str | None = None) -> list[Case]:
    """The cases of one op (or of all) and one size (or of both)."""
    return [c for c in CASES if op in (None, c.op) and size in (None, c.size)]


def ops() -> list[str]:
    """The ops that have cases, in the order of the table."""
    return list(dict.fromkeys(case.op for case in CASES))
