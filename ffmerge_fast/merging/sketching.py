"""Whether `collect` keeps exact products of pairs or a sketch of each layer, and what either costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..models.sublayers import FFNs
from ..support.errors import FFMergeError
from ..support.sizes import format_bytes
from .settings import SMALLEST_SKETCH

FEWEST_ROWS, WIDTHS_PER_ROW = 1024, 3.5  # "auto": measured to lose about 1 % at most (benchmarks/studies/sketch.py)
WANTED_LOSS = 0.01  # of the assignment's objective


class Cost(NamedTuple):
    """Of the sums of all stacks."""

    nbytes: int
    multiplications: int


def exact_cost(pairs: Mapping[str, Iterable[tuple[int, int]]], ffns: FFNs, tokens: int) -> Cost:
    """Of one matrix per pair."""
    sizes = [ffns.at(stack, i).d_ff * ffns.at(stack, j).d_ff for stack, each in pairs.items() for i, j in each]
    return Cost(4 * sum(sizes), tokens * sum(sizes))


def sketch_cost(pairs: Mapping[str, Sequence[tuple[int, int]]], ffns: FFNs, tokens: int, rows: int) -> Cost:
    """Of a ring per layer, and of the products of the pairs when they are read."""
    layers = {(stack, i) for stack, each in pairs.items() for pair in each for i in pair}
    widths = sum(ffns.at(*layer).d_ff for layer in layers)
    return Cost(4 * rows * widths, tokens * widths + exact_cost(pairs, ffns, rows).multiplications)


def usual_rows(pairs: Mapping[str, Iterable[tuple[int, int]]], ffns: FFNs) -> int:
    """What "auto" takes: a power of two, the larger the wider the FFNs."""
    widest = max(ffns.at(stack, i).d_ff for stack, each in pairs.items() for pair in each for i in pair)
    return max(FEWEST_ROWS, 2 ** math.ceil(math.log2(widest / WIDTHS_PER_ROW)))


def chosen_rows(
    sketch: int | str | None,
    pairs: Mapping[str, Sequence[tuple[int, int]]],
    ffns: FFNs,
    tokens: int,
    max_memory: int | None = None,
) -> int | None:
    """The rows of each layer's sketch; None for exact products.

    Args:
        sketch: a number of rows; None; or "auto": exact where that takes less memory and fewer multiplications, where
            fewer than two tokens come to a row, or where a stack's sketch exceeds `max_memory`; else 1024 rows, and
            more for d_ff above 3584.

    Raises:
        FFMergeError: `sketch` is something else, or more than the tokens.
    """
    if sketch is None:
        return None
    if sketch == "auto":
        rows = usual_rows(pairs, ffns)
        exact, sketched = exact_cost(pairs, ffns, tokens), sketch_cost(pairs, ffns, tokens, rows)
        cheaper = exact.nbytes <= sketched.nbytes and exact.multiplications <= sketched.multiplications
        largest = max(sketch_cost({stack: each}, ffns, tokens, rows).nbytes for stack, each in pairs.items())
        too_large = max_memory is not None and largest > max_memory  # which is for each stack
        return None if cheaper or too_large or tokens < 2 * rows else rows
    if type(sketch) is not int or sketch < SMALLEST_SKETCH:
        raise FFMergeError(
            f"sketch: got {sketch!r}, wanted a number of rows, {SMALLEST_SKETCH} or more ({FEWEST_ROWS} is usual), "
            "'auto' or None (exact)"
        )
    if sketch > tokens:
        raise FFMergeError(
            f"sketch: got {sketch} rows for {tokens} tokens, wanted fewer rows than tokens; exact products cost less "
            "then: leave it out (--exact)"
        )
    return sketch


def fitting_rows(rows: int, nbytes: int, pairs: Mapping[str, Sequence[tuple[int, int]]], ffns: FFNs) -> int:
    """These rows or half as many, and so on, that fit into so many bytes; 128 at least. Plans say what that loses."""
    while rows > 128 and sketch_cost(pairs, ffns, 0, rows).nbytes > nbytes:
        rows //= 2
    return rows


def described(rows: int | None, pairs: Mapping[str, Sequence[tuple[int, int]]], ffns: FFNs, tokens: int) -> str:
    """What is kept, and what the other way would take."""
    exact = format_bytes(exact_cost(pairs, ffns, tokens).nbytes)
    if rows is None:
        usual = usual_rows(pairs, ffns)
        other = format_bytes(sketch_cost(pairs, ffns, tokens, usual).nbytes)
        return f"exact products of pairs, {exact} (a sketch of {usual:,} rows per layer: {other})"
    mine = format_bytes(sketch_cost(pairs, ffns, tokens, rows).nbytes)
    return f"sketch of {rows:,} rows per layer, {mine} (exact products of pairs: {exact})"
