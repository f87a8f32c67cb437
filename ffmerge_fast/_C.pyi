"""Mirrors csrc/bindings.cpp."""

def cpu_isa() -> str:
    """The best instruction set this process can use: "portable", "avx2", "avx512" or "amx"."""

def cpu_isas() -> list[str]:
    """Every instruction set this process can use, lowest first; the last one is `cpu_isa()`."""

def prefer_huge_pages(start: int, bytes: int) -> None:
    """Advise the system that this memory is about to be written; on Linux it then faults per 2 MiB, not per 4 KiB."""

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

# Correlation (csrc/correlation/). Tensors are passed as addresses; the extension keeps none of them. A form is
# (width, left, right, split): what the packed chunks of a layer hold.

def correlation_pack_rows(
    x: int,
    dtype: int,
    tokens: int,
    width: int,
    stride: int,
    activation: int,
    pivot: int,
    sum: int,
    sumsq: int,
    rounded: bool,
    out: int,
    isa: str,
    threads: int,
) -> None:
    """Features x [tokens, width] (dtype 0 float32, 1 bfloat16, 2 float16; rows `stride` elements apart) to rows.

    out = activation(x) - pivot, float32, if `rounded` to bfloat16 values; its Σ and Σ² are added to sum and sumsq
    (float64).
    """

def correlation_pack_tiles(
    x: int,
    dtype: int,
    tokens: int,
    width: int,
    stride: int,
    activation: int,
    pivot: int,
    sum: int,
    sumsq: int,
    form: tuple[int, bool, bool, bool],
    filled: int,
    chunks: list[int],
    isa: str,
    threads: int,
) -> None:
    """The same to the operand forms of AMX, behind the `filled` tokens that the chunks hold already."""

def correlation_accumulate_ring(
    x: int,
    dtype: int,
    tokens: int,
    width: int,
    stride: int,
    activation: int,
    pivot: int,
    sum: int,
    sumsq: int,
    rows: int,
    count: int,
    first: int,
    signs: int,
    at: int,
    isa: str,
    threads: int,
) -> None:
    """Add signs[t] · (activation(x[at[t]]) - pivot) to row (first + t) % count of a ring [count, width], and Σ, Σ².

    signs float32 [tokens]; at int64 [tokens], or 0 for 0, 1, ..., tokens - 1.
    """

def correlation_chunk_bytes(form: tuple[int, bool, bool, bool]) -> int:
    """Size of a chunk of 256 tokens."""

def correlation_accumulator_bytes(width_a: int, width_b: int) -> int:
    """Size of the tiled products of a pair."""

def correlation_multiply_tiles(
    layers: list[tuple[tuple[int, bool, bool, bool], int, list[int]]],
    products: list[tuple[int, int, int]],
    emulated: bool,
    threads: int,
) -> None:
    """For each (accumulator, a, b): accumulator += aᵀ b, a and b being indices into layers (form, tokens, chunks)."""

def correlation_untile(
    accumulator: int, width_a: int, width_b: int, symmetric: bool, matrix: int, threads: int
) -> None:
    """Tiled products to a row-major float32 matrix [width_a, width_b]."""

def correlation_tile(matrix: int, width_a: int, width_b: int, accumulator: int, threads: int) -> None:
    """The inverse of `correlation_untile`."""

def projection_select_f32(
    shape: tuple[int, int],
    x_shape: tuple[int, int],
    x: int,
    x_strides: tuple[int, int],
    rows: int,
    columns: int,
    residual: int,
    residual_strides: tuple[int, int],
    out: int,
    out_stride: int,
    threads: int,
) -> None:
    """out[i, j] = x[rows[i], columns[j]] + residual[i, j] for float32 matrices; indices int64, 0 for the whole axis.

    `shape` is that of out, whose rows are contiguous; a residual of 0 is none. Strides in elements. IndexError for an
    index outside of `x_shape`; nothing was written then.
    """

def projection_scatter_f32(
    shape: tuple[int, int],
    out_shape: tuple[int, int],
    y: int,
    y_strides: tuple[int, int],
    rows: int,
    columns: int,
    out: int,
    out_stride: int,
    threads: int,
) -> None:
    """out[rows[i], columns[j]] += y[i, j] for float32 matrices. `shape` is that of y; rows of out are contiguous.

    IndexError for an index outside of `out_shape`; nothing was written then.
    """

# Shared FFN (csrc/shared_ffn/). A weight is (data, bias, outputs, inputs, stride, transposed): rows of inputs `stride`
# elements apart, or transposed, rows of outputs; bias 0 if there is none, data 0 for the gate of a plain FFN.

_Weight = tuple[int, int, int, int, int, bool]

def shared_ffn_decode(
    up: _Weight,
    gate: _Weight,
    down: _Weight,
    dtype: int,
    activation: int,
    x: int,
    tokens: int,
    x_stride: int,
    y: int,
    isa: str,
    tiles: int,
    threads: int,
) -> None:
    """y [tokens, down.outputs] = down(act(up x)), or down(act(gate x) · up x), all of one dtype; for few tokens.

    tiles: 1 for AMX in bfloat16 up to 16 tokens, 2 for its emulation, 0 for neither.
    """

def shared_ffn_activate(
    activation: int, dtype: int, up: int, gate: int, hidden: int, count: int, isa: str, threads: int
) -> None:
    """hidden = act(up), or act(gate) · up unless gate is 0, elementwise; hidden may be up or gate."""

def shared_ffn_activate_backward(
    activation: int,
    dtype: int,
    d_hidden: int,
    up: int,
    gate: int,
    d_up: int,
    d_gate: int,
    hidden: int,
    count: int,
    isa: str,
    threads: int,
) -> None:
    """d_up, d_gate (gated only) and, unless 0, hidden again; outputs may be the memory of any input."""
