"""Triton kernels of the `shared_ffn` op. Imported on first use: it needs triton.

INTERPRETED marks what Triton's interpreter (3.9) gets wrong: it truncates to bfloat16, and multiplies bfloat16 wrongly.
"""

import triton
import triton.language as tl

from ..correlation.triton_kernels import _activate
from ..projection.triton_kernels import _rounded


@triton.jit
def _derivative(x, NAME: tl.constexpr):
    """Of `_activate`, the same expressions differentiated by hand."""
    if NAME == "relu":
        d = tl.where(x <= 0, 0.0, 1.0)
    elif NAME == "relu2":
        d = 2 * tl.where(x < 0, 0.0, x)
    elif NAME == "gelu":
        d = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        d = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif NAME == "silu":
        s = tl.sigmoid(x)
        d = s + x * s * (1 - s)
    else:
        tl.static_assert(NAME == "quick_gelu")
        s = tl.sigmoid(1.702 * x)
        d = s + 1.702 * x * s * (1 - s)
    return d


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


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
            tl.store(kept_up + at, _rounded(u, dtype, INTERPRETED), mask=inside)
        if gate is not None:
            if gate_bias is not None:
                g += tl.load(gate_bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            if kept_gate is not None:
                tl.store(kept_gate + at, _rounded(g, dtype, INTERPRETED), mask=inside)
            u *= _activate(g, ACTIVATION)
        else:
            u = _activate(u, ACTIVATION)
        tl.store(hidden + at, _rounded(u, dtype, INTERPRETED), mask=inside)


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
            acc = _dot(a, b, acc, INTERPRETED)
            if gate is not None:
                b = _load_weights(gates, column, start, N, K, stride_gn, stride_gk, TMA, BLOCK_N, BLOCK_K)
                acc_gate = _dot(a, b, acc_gate, INTERPRETED)
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
    """Activation and its derivative, the gradients' column sums with them, in one pass."""
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
            act = _activate(g, ACTIVATION)
            h = act * u
        else:
            h = _activate(u, ACTIVATION)
        if hidden is not None:
            tl.store(hidden + at, _rounded(h, dtype, INTERPRETED), mask=inside)
        if d_hidden is not None:
            if gate is not None:
                d_g = d * u * _derivative(g, ACTIVATION)
                tl.store(d_gate + at, _rounded(d_g, dtype, INTERPRETED), mask=inside)
                if gate_sums is not None:
                    total_gate += d_g
                d *= act
            else:
                d *= _derivative(u, ACTIVATION)
            tl.store(d_up + at, _rounded(d, dtype, INTERPRETED), mask=inside)
            if up_sums is not None:
                total_up += d
    at = part.to(tl.int64) * N + n
    if up_sums is not None:
        tl.store(up_sums + at, tl.sum(total_up, 0), mask=n < N)
    if gate_sums is not None:
        tl.store(gate_sums + at, tl.sum(total_gate, 0), mask=n < N)


@triton.jit
def _skinny_products(
    x,  # [M, K], M <= 16
    w,  # [N, K]
    v,  # as w, or None
    n,  # which rows of w and v
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_vn,
    stride_vk,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x · w[n]ᵀ and x · v[n]ᵀ, float32 [16, len(n)].

    Every warp sums its own share of K: multiply-adds into one small accumulator wait for each other.
    """
    SHARE: tl.constexpr = BLOCK_K // WARPS
    m = tl.arange(0, 16)[None, :, None]
    k = tl.arange(0, WARPS)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    kx = k[:, None, :]
    kw = k[:, :, None]
    rows = n[None, None, :]
    x_at = x + m * stride_xm + kx * stride_xk
    w_at = w + rows.to(tl.int64) * stride_wn + kw.to(tl.int64) * stride_wk
    acc_w = tl.zeros((WARPS, 16, n.shape[0]), tl.float32)
    if v is not None:
        v_at = v + rows.to(tl.int64) * stride_vn + kw.to(tl.int64) * stride_vk
        acc_v = tl.zeros((WARPS, 16, n.shape[0]), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(x_at, mask=(m < M) & (kx < K - start), other=0.0)
        b = tl.load(w_at, mask=(rows < N) & (kw < K - start), other=0.0)
        acc_w = _dot(a, b, acc_w, INTERPRETED)
        x_at += BLOCK_K * stride_xk
        w_at += BLOCK_K * stride_wk
        if v is not None:
            b = tl.load(v_at, mask=(rows < N) & (kw < K - start), other=0.0)
            acc_v = _dot(a, b, acc_v, INTERPRETED)
            v_at += BLOCK_K * stride_vk
    product_w = tl.sum(acc_w, 0)
    product_v = product_w
    if v is not None:
        product_v = tl.sum(acc_v, 0)
    return product_w, product_v


@triton.jit
def _prefetch(w, n, k, N, K, stride_n, stride_k):
    """Ask for the cache lines of w[n, k]."""
    n = tl.minimum(n, N - 1).to(tl.int64)
    k = tl.minimum(k, K - 1).to(tl.int64)
    at = (w + n[:, None] * stride_n + k[None, :] * stride_k).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["M"])
def _shared_ffn_decode_kernel(
    x,  # [M, D], M <= 16
    up,  # [F, D]
    gate,  # [F, D], or None
    down,  # [N, F]
    up_bias,  # [F], or None
    gate_bias,
    down_bias,  # [N], or None
    hidden,  # [M, F] scratch
    y,  # [M, N] contiguous
    counters,  # two int32, 0 before and after: slices of hidden that are ready, readers that need them no more
    M,
    D,
    F,
    N,
    stride_xm,
    stride_xd,
    stride_uf,
    stride_ud,
    stride_gf,
    stride_gd,
    stride_dn,
    stride_df,
    ACTIVATION: tl.constexpr,
    PREFETCH: tl.constexpr,  # of down, into the L2 cache: "rows" or "columns", as it is stored, or "" for none
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A whole FFN for a few tokens: y = down(hidden), where hidden is as above.

    The first programs write hidden, a slice of d_ff each; the last ones wait for all of them and write y, a slice of
    its columns each. Every weight is read once, every sum has one fixed order.
    """
    program = tl.program_id(0)
    writers = tl.cdiv(F, BLOCK_F)
    m = tl.arange(0, 16)[:, None]
    if program < writers:
        f = program * BLOCK_F + tl.arange(0, BLOCK_F)
        h, g = _skinny_products(
            *(x, up, gate, f, M, F, D, stride_xm, stride_xd, stride_uf, stride_ud, stride_gf, stride_gd),
            BLOCK_D,
            WARPS,
            INTERPRETED,
        )
        if up_bias is not None:
            h += tl.load(up_bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
        if gate is not None:
            if gate_bias is not None:
                g += tl.load(gate_bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
            h *= _activate(g, ACTIVATION)
        else:
            h = _activate(h, ACTIVATION)
        h = _rounded(h, hidden.dtype.element_ty, INTERPRETED)
        tl.store(hidden + m * F + f[None, :], h, mask=(m < M) & (f < F)[None, :])
        tl.debug_barrier()  # all threads have written
        tl.atomic_add(counters, 1, sem="release")
    else:
        reader = program - writers
        readers = tl.num_programs(0) - writers
        if PREFETCH == "rows":
            for start in range(0, F, 1024):
                n = reader * BLOCK_N + tl.arange(0, BLOCK_N)
                _prefetch(down, n, start + 64 * tl.arange(0, 16), N, F, stride_dn, stride_df)
        elif PREFETCH == "columns":
            for start in range(0, F, 512):
                n = reader * BLOCK_N + tl.arange(0, 1)
                _prefetch(down, n, start + tl.arange(0, 512), N, F, stride_dn, stride_df)
        while tl.atomic_add(counters, 0, sem="acquire") < writers:
            pass
        for start in range(reader * BLOCK_N, N, readers * BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            out, _ = _skinny_products(
                *(hidden, down, None, n, M, N, F, F, 1, stride_dn, stride_df, 0, 0), BLOCK_K, WARPS, INTERPRETED
            )
            if down_bias is not None:
                out += tl.load(down_bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            out = _rounded(out, y.dtype.element_ty, INTERPRETED)
            tl.store(y + m * N + n[None, :], out, mask=(m < M) & (n < N)[None, :])
        if tl.atomic_add(counters + 1, 1) == readers - 1:  # for the next launch; nobody waits any more
            tl.store(counters, 0)
            tl.store(counters + 1, 0)
