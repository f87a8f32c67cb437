"""Mirrors csrc/bindings.cpp."""

def cpu_isa() -> str:
    """The best instruction set this process can use: "portable", "avx2", "avx512" or "amx"."""

def cpu_isas() -> list[str]:
    """Every instruction set this process can use, lowest first; the last one is `cpu_isa()`."""

def assignment_f32(
    scores: int,
    batch: int,
    d: int,
    batch_stride: int,
    row_stride: int,
    transposed: bool,
    minimize: bool,
    isa: str,
    threads: int,
    permutation: int,
    objective: int,
    gap: int,
) -> None:
    """Exact assignment of float32 matrices [batch, d, d] with one dimension contiguous; strides in elements.

    Addresses: scores; outputs permutation int64 [batch, d], objective and relative gap float64 [batch].
    `transposed`: the contiguous dimension is that of the rows, and `row_stride` the stride between columns.
    """

def assignment_f64(
    scores: int,
    batch: int,
    d: int,
    batch_stride: int,
    row_stride: int,
    transposed: bool,
    minimize: bool,
    isa: str,
    threads: int,
    permutation: int,
    objective: int,
    gap: int,
) -> None:
    """Exact assignment of float64 matrices [batch, d, d] with one dimension contiguous; strides in elements.

    Addresses: scores; outputs permutation int64 [batch, d], objective and relative gap float64 [batch].
    `transposed`: the contiguous dimension is that of the rows, and `row_stride` the stride between columns.
    """
