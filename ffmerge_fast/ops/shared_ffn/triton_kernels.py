"""Triton kernels of the `shared_ffn` op for many tokens. Imported on first use: it needs triton.

INTERPRETED marks what Triton's interpreter (3.9) gets wrong: it truncates to bfloat16, and multiplies bfloat16 wrongly.
"""

import triton
import triton.language as tl

from ..common.triton_math import activate, derivative, dot, rounded


@triton.jit
def _weights(w, rows, width, stride_n, stride_k, TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A descriptor of w [rows, width], stored in rows (nn.Linear) or in columns (Conv1D); w itself without TMA."""
    if TMA == "rows":
        w = tl.make_tensor_descriptor(w, [rows, width], [stride_n, 1], [BLOCK_N, BLOCK_K])
    elif TMA == "columns":
        w = tl.make_tensor_descriptor(w, [width, rows], [stride_k, 1], [BLOCK_K, BLOCK_N])
    return w


@triton.jit
def _load_weights(
    w,
    start_n,
    start_k,
    rows,
    width,
    stride_n,
    stride_k,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """wᵀ[start_k:, start_n:], zeros outside."""
    if TMA == "rows":
        block = w.load([start_n, start_k]).T
    elif TMA == "columns":
        block = w.load([start_k, start_n])
    else:
        n = start_n + tl.arange(0, BLOCK_N)[None, :]
        k = start_k + tl.arange(0, BLOCK_K)[:, None]
        at = w + n.to(tl.int64) * stride_n + k.to(tl.int64) * stride_k
        block = tl.load(at, mask=(n < rows) & (k < width), other=0.0)
    return block


@triton.jit
def _write_hidden(
    pointers,
    row,
    column,
    M,
    N,
    u,
    g,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The epilogue, in PARTS column blocks one after the other: fewer registers and less shared memory."""
    ROWS: tl.constexpr = u.shape[0]
    COLUMNS: tl.constexpr = u.shape[1]
    if PARTS > 1:
        HALF: tl.constexpr = COLUMNS // 2
        u_left, u_right = tl.split(tl.permute(tl.reshape(u, (ROWS, 2, HALF)), (0, 2, 1)))
        g_left, g_right = tl.split(tl.permute(tl.reshape(g, (ROWS, 2, HALF)), (0, 2, 1)))
        _write_hidden(pointers, row, column, M, N, u_left, g_left, ACTIVATION, PARTS // 2, INTERPRETED)
        _write_hidden(pointers, row, column + HALF, M, N, u_right, g_right, ACTIVATION, PARTS // 2, INTERPRETED)
    else:
        gate, up_bias, gate_bias, hidden, kept_up, kept_gate = pointers
        dtype: tl.constexpr = hidden.dtype.element_ty
        m = row + tl.arange(0, ROWS)
        n = column + tl.arange(0, COLUMNS)
        inside = (m < M)[:, None] & (n < N)[None, :]
        at = m[:, None].to(tl.int64) * N + n[None, :]
        if up_bias is not None:
            u += tl.load(up_bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if kept_up is not None:
            tl.store(kept_up + at, rounded(u, dtype, INTERPRETED), mask=inside)
        if gate is not None:
            if gate_bias is not None:
                g += tl.load(gate_bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            if kept_gate is not None:
                tl.store(kept_gate + at, rounded(g, dtype, INTERPRETED), mask=inside)
            u *= activate(g, ACTIVATION)
        else:
            u = activate(u, ACTIVATION)
        tl.store(hidden + at, rounded(u, dtype, INTERPRETED), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _shared_ffn_hidden_kernel(
    x,  # [M, K]
    up,  # [N, K]
    gate,  # [N, K], or None
    up_bias,  # [N], or None
    gate_bias,
    hidden,  # [M, N], contiguous like the two below
    kept_up,  # pre-activations, or None
    kept_gate,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_un,
    stride_uk,
    stride_gn,
    stride_gk,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,  # "rows" or "columns", as the weights are stored; "" for pointers, which any strides allow
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # of a tile that are activated and written one after the other
    INTERPRETED: tl.constexpr,
):
    """hidden = act(x · upᵀ), or act(x · gateᵀ) · (x · upᵀ) from one pass over x.

    Program p of P takes tiles p, p + P, ...: what it costs to describe matrices to TMA is paid once.
    Naive loop: `reference.forward`, up to hidden.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pointers = (gate, up_bias, gate_bias, hidden, kept_up, kept_gate)
    xs = x
    if TMA != "":
        xs = tl.make_tensor_descriptor(x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    ups = _weights(up, N, K, stride_un, stride_uk, TMA, BLOCK_N, BLOCK_K)
    if gate is not None:
        gates = _weights(gate, N, K, stride_gn, stride_gk, TMA, BLOCK_N, BLOCK_K)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # Eight rows of tiles at a time: what they read of the weights stays in the cache.
        first = tile // (8 * tiles_n) * 8
        height = tl.minimum(tiles_m - first, 8)
        inside_group = tile % (8 * tiles_n)
        row = (first + inside_group % height) * BLOCK_M
        column = inside_group // height * BLOCK_N
        m = row + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_gate = acc
        for start in range(0, K, BLOCK_K):
            if TMA == "":
                k = start + tl.arange(0, BLOCK_K)[None, :]
                at = xs + m[:, None].to(tl.int64) * stride_xm + k.to(tl.int64) * stride_xk
                a = tl.load(at, mask=(m < M)[:, None] & (k < K), other=0.0)
            else:
                a = xs.load([row, start])
            b = _load_weights(ups, column, start, N, K, stride_un, stride_uk, TMA, BLOCK_N, BLOCK_K)
            acc = dot(a, b, acc, INTERPRETED)
            if gate is not None:
                b = _load_weights(gates, column, start, N, K, stride_gn, stride_gk, TMA, BLOCK_N, BLOCK_K)
                acc_gate = dot(a, b, acc_gate, INTERPRETED)
        if gate is None:
            acc_gate = acc
        _write_hidden(pointers, row, column, M, N, acc, acc_gate, ACTIVATION, PARTS, INTERPRETED)


@triton.jit(do_not_specialize=["M"])
def _shared_ffn_activate_kernel(
    up,  # pre-activations [M, N]; all matrices are contiguous
    gate,  # of the gate, or None
    d_hidden,  # gradient of hidden, or None: forward alone
    hidden,  # is written, or None; it may be `up`
    d_up,  # is written beside d_hidden, which it may be
    d_gate,  # is written beside gate; it may be `gate`
    up_sums,  # [parts, N] float32: column sums of d_up over CHUNK rows, or None
    gate_sums,
    M,
    N,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Activation and its derivative, the gradients' column sums with them, in one pass.

    Naive loop: `reference.backward`, without its matrix products.
    """
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = up.dtype.element_ty
    if up_sums is not None:
        total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if gate_sums is not None:
        total_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(part * CHUNK, tl.minimum(part * CHUNK + CHUNK, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = (m < M)[:, None] & (n < N)[None, :]
        at = m[:, None].to(tl.int64) * N + n[None, :]
        u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        if d_hidden is not None:
            d = tl.load(d_hidden + at, mask=inside, other=0.0).to(tl.float32)
        tl.debug_barrier()  # all threads have read what others may overwrite now
        if gate is not None:
            act = activate(g, ACTIVATION)
            h = act * u
        else:
            h = activate(u, ACTIVATION)
        if hidden is not None:
            tl.store(hidden + at, rounded(h, dtype, INTERPRETED), mask=inside)
        if d_hidden is not None:
            if gate is not None:
                d_g = d * u * derivative(g, ACTIVATION)
                tl.store(d_gate + at, rounded(d_g, dtype, INTERPRETED), mask=inside)
                if gate_sums is not None:
                    total_gate += d_g
                d *= act
            else:
                d *= derivative(u, ACTIVATION)
            tl.store(d_up + at, rounded(d, dtype, INTERPRETED), mask=inside)
            if up_sums is not None:
                total_up += d
    at = part.to(tl.int64) * N + n
    if up_sums is not None:
        tl.store(up_sums + at, tl.sum(total_up, 0), mask=n < N)
    if gate_sums is not None:
        tl.store(gate_sums + at, tl.sum(total_gate, 0), mask=n < N)
