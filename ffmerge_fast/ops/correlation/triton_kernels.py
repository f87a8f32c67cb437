"""Triton kernels of the `correlation` op. Imported on first use: it needs triton.

Packed features of one layer: bfloat16 [1 + tokens, pitch], the tokens filled up with zero rows to a multiple of 64. A
row holds the high half of each value and, with SPLIT, the low halves beside them: x = high + low, but for 2⁻¹⁶ |x|.
Row 0 is flags (SPLIT): 1 in column j where some low half of feature j is not 0.

INTERPRETED marks what Triton's interpreter (3.9) gets wrong: it truncates to bfloat16, and multiplies bfloat16 wrongly.
"""

import triton
import triton.language as tl

from ..common.triton_math import activate, pick, to_bfloat16

PAIRS = 8  # per launch; their addresses are arguments, so that nothing is copied to the device at a launch
ALIGNMENT = 64  # of a row's halves, in features: TMA wants 16 bytes, swizzling 128


@triton.jit(do_not_specialize=["tokens", "rows", "chunk"])
def _correlation_accumulate_layer_kernel(
    x,  # [tokens, width], any strides
    mask,  # [tokens] uint8, or None
    pivot,  # [width] float32, or None: 0
    out,  # first row to write, or None: sums only
    flags,  # [width] bfloat16, row 0 of the packed features (SPLIT only)
    sums,  # [chunks, 2, width] float64: Σ and Σ² per chunk of rows
    counts,  # [chunks] int64
    tokens,
    rows,  # tokens and the zero rows after them
    chunk,  # rows per program
    width,
    stride_t,
    stride_d,
    pitch,  # of `out`
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,  # high and low halves, side by side
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Activation, minus pivot, rounding, and column sums, in one pass over the features.

    Naive loop: `reference.accumulate_layer_`.
    """
    part = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    shift = tl.zeros((BLOCK_D,), tl.float32)
    if pivot is not None:
        shift = tl.load(pivot + columns, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float64)
    squares = tl.zeros((BLOCK_T, BLOCK_D), tl.float64)
    rest = tl.zeros((BLOCK_T, BLOCK_D), tl.int32)
    counted = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, rows), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        live = t < tokens
        if mask is not None:
            live = live & (tl.load(mask + t, mask=live, other=0) != 0)
        counted += live.to(tl.int32)
        counting = live[:, None] & inside[None, :]
        t = t.to(tl.int64)[:, None]
        d = columns.to(tl.int64)[None, :]
        value = tl.load(x + t * stride_t + d * stride_d, mask=counting, other=0.0).to(tl.float32)
        value = tl.where(counting, activate(value, ACTIVATION) - shift[None, :], 0.0)
        if out is not None:
            writing = (t < rows) & inside[None, :]
            high = value
            if out.dtype.element_ty == tl.bfloat16:
                high = to_bfloat16(value, INTERPRETED)
            tl.store(out + t * pitch + d, high, mask=writing)
            if SPLIT:
                low = to_bfloat16(value - high.to(tl.float32), INTERPRETED)
                nonzero = low.to(tl.float32) != 0
                rest = rest | nonzero.to(tl.int32)
                tl.store(out + t * pitch + pitch // 2 + d, low, mask=writing)
            else:  # variances must agree with products of rounded values; halves are closer than that
                value = high.to(tl.float32)
        exact = value.to(tl.float64)
        total += exact
        squares += exact * exact
    sums += part.to(tl.int64) * 2 * width
    tl.store(sums + columns, tl.sum(total, 0), mask=inside)
    tl.store(sums + width + columns, tl.sum(squares, 0), mask=inside)
    if SPLIT:  # programs of other rows may write the same 1
        found = tl.max(rest, 0) > 0
        tl.store(flags + columns, tl.full((BLOCK_D,), 1.0, tl.bfloat16), mask=inside & found)
    if tl.program_id(0) == 0:
        tl.store(counts + part, tl.sum(counted, 0).to(tl.int64))


@triton.jit(do_not_specialize=["tokens", "offset", "chunk"])
def _correlation_accumulate_ring_kernel(
    x,  # [..., width], any strides: the tokens themselves, or what `at` chooses from
    at,  # [tokens] int64: each token's row of x, or None
    signs,  # [tokens] float32
    pivot,  # [width] float32
    ring,  # [tokens, width] float32: the rows of these tokens
    sums,  # [chunks, 2, width] float64: Σ and Σ² per chunk of tokens
    tokens,
    offset,  # of token 0 in the first chunk
    chunk,  # tokens per program
    width,
    stride_t,
    stride_d,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Activation, minus pivot, times sign, added to as many rows of a ring, and column sums: one pass over features.

    Every token has a row of its own, so nothing is added twice in a launch.
    Naive loop: `reference.accumulate_ring_`.
    """
    part = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    shift = tl.load(pivot + columns, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float64)
    squares = tl.zeros((BLOCK_T, BLOCK_D), tl.float64)
    for start in range(part * chunk - offset, tl.minimum(part * chunk - offset + chunk, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        live = (t >= 0) & (t < tokens)
        sign = tl.load(signs + t, mask=live, other=0.0)
        row = t.to(tl.int64)
        if at is not None:
            row = tl.load(at + t, mask=live, other=0)
        counting = live[:, None] & inside[None, :]
        d = columns.to(tl.int64)[None, :]
        value = tl.load(x + row[:, None] * stride_t + d * stride_d, mask=counting, other=0.0).to(tl.float32)
        value = tl.where(counting, activate(value, ACTIVATION) - shift[None, :], 0.0)
        to = ring + t.to(tl.int64)[:, None] * width + d
        tl.store(to, tl.load(to, mask=counting, other=0.0) + sign[:, None] * value, mask=counting)
        exact = value.to(tl.float64)
        total += exact
        squares += exact * exact
    sums += part.to(tl.int64) * 2 * width
    tl.store(sums + columns, tl.sum(total, 0), mask=inside)
    tl.store(sums + width + columns, tl.sum(squares, 0), mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def _correlation_layer_sums_kernel(sums, counts, count, total, squares, chunks, width, BLOCK_D: tl.constexpr):
    """Add the chunks' sums in their order to a layer's count, Σ and Σ²: the same bits every time.

    Naive loop: `reference.accumulate_layer_`, its sums.
    """
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    new_total = tl.load(total + columns, mask=inside, other=0.0)
    new_squares = tl.load(squares + columns, mask=inside, other=0.0)
    tokens = tl.zeros((), tl.int64)
    for part in range(chunks):
        row = sums + tl.cast(part, tl.int64) * 2 * width + columns
        new_total += tl.load(row, mask=inside, other=0.0)
        new_squares += tl.load(row + width, mask=inside, other=0.0)
        tokens += tl.load(counts + part)
    tl.store(total + columns, new_total, mask=inside)
    tl.store(squares + columns, new_squares, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(count, tl.load(count) + tokens)


@triton.jit
def _flagged(flags, start, width, BLOCK: tl.constexpr):
    """1 if a feature in start ... start + BLOCK has a low half, else 0."""
    columns = start + tl.arange(0, BLOCK)
    return tl.max((tl.load(flags + columns, mask=columns < width, other=0.0).to(tl.float32) > 0).to(tl.int32), 0)


@triton.jit
def _add(c, row, column, rows, width, x, PARTS: tl.constexpr):
    """c[row:, column:] += x in PARTS column blocks one after the other: fewer registers and less shared memory."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if PARTS > 1:
        left, right = tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))
        _add(c, row, column, rows, width, left, PARTS // 2)
        _add(c, row, column + N // 2, rows, width, right, PARTS // 2)
    else:
        i = row + tl.arange(0, M)[:, None]
        j = column + tl.arange(0, N)[None, :]
        at = c + i.to(tl.int64) * width + j
        inside = (i < rows) & (j < width)
        tl.store(at, tl.load(at, mask=inside, other=0.0) + x, mask=inside)


@triton.jit(do_not_specialize=["pairs", "tokens"])
def _correlation_accumulate_pairs_kernel(
    a,  # PAIRS pointers: packed features [1 + tokens, pitch] of the first sides
    b,  # and of the second sides
    c,  # PAIRS pointers: float32 [width_a, width_b]
    problems,  # [pairs, 4] int32: width_a, width_b / VECTOR, first tile, last tile + 1
    tiles,  # int32: row block << 16 | column block
    pairs,
    tokens,
    SPLIT: tl.constexpr,
    HIGH: tl.constexpr,  # 1; with SPLIT also 0: high·high is left out, tiles without low halves are left alone
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,  # of BLOCK_K tokens that are summed in the tensor cores before they are added to c
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,  # divides every width_b
    INTERPRETED: tl.constexpr,
):
    """c += aᵀb for several pairs in one persistent launch: program p of P takes tiles p, p + P, ... over all pairs.

    A tile belongs to one program, so every sum has one fixed order. With SPLIT, low·high and high·low come before
    high·high (small terms first), each only where the flags of the tile's features ask for it.
    Naive loop: `reference.accumulate_pair_`.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    steps = tl.cdiv(tokens, BLOCK_K)
    HALVES: tl.constexpr = 2 if SPLIT else 1
    for pair in range(pairs):
        width_a = tl.load(problems + 4 * pair)
        width_b = tl.load(problems + 4 * pair + 1) * VECTOR  # so the compiler sees that it divides
        first = tl.load(problems + 4 * pair + 2)
        last = tl.load(problems + 4 * pair + 3)
        start = first + (program - first % programs + programs) % programs
        if start < last:
            half_a = tl.cdiv(width_a, 64) * 64
            half_b = tl.cdiv(width_b, 64) * 64
            flags_a = pick(a, pair)
            flags_b = pick(b, pair)
            out = pick(c, pair)
            pitch_a = HALVES * half_a
            pitch_b = HALVES * half_b
            rows_a = tl.make_tensor_descriptor(
                flags_a + pitch_a, [steps * BLOCK_K, pitch_a], [pitch_a, 1], [BLOCK_K, BLOCK_M]
            )
            rows_b = tl.make_tensor_descriptor(
                flags_b + pitch_b, [steps * BLOCK_K, pitch_b], [pitch_b, 1], [BLOCK_K, BLOCK_N]
            )
            for index in range(start, last, programs):
                tile = tl.load(tiles + index)
                row = (tile >> 16) * BLOCK_M
                column = (tile & 0xFFFF) * BLOCK_N
                low_a = 0
                low_b = 0
                if SPLIT:
                    low_a = _flagged(flags_a, row, width_a, BLOCK_M)
                    low_b = _flagged(flags_b, column, width_b, BLOCK_N)
                products = low_a + low_b + HIGH
                for begin in range(0, tl.where(products > 0, steps, 0), STEPS):
                    length = tl.minimum(steps - begin, STEPS)
                    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    if SPLIT:
                        end_a = low_a * length  # low·high, then high·low, then high·high
                        end_b = end_a + low_b * length
                        for step in range(0, end_b + length * HIGH):
                            done = tl.where(step < end_a, 0, tl.where(step < end_b, end_a, end_b))
                            k = (begin + step - done) * BLOCK_K
                            x = rows_a.load([k, row + tl.where(step < end_a, half_a, 0)])
                            y = rows_b.load([k, column + tl.where((step >= end_a) & (step < end_b), half_b, 0)])
                            if INTERPRETED:
                                x = x.to(tl.float32)
                                y = y.to(tl.float32)
                            acc = tl.dot(x.T, y, acc)
                    else:
                        for step in range(begin, begin + length):
                            x = rows_a.load([step * BLOCK_K, row])
                            y = rows_b.load([step * BLOCK_K, column])
                            if INTERPRETED:
                                x = x.to(tl.float32)
                                y = y.to(tl.float32)
                            acc = tl.dot(x.T, y, acc)
                    _add(out, row, column, width_a, width_b, acc, PARTS)
