"""The Triton kernel of the `shared_ffn` op for few tokens. Imported on first use: it needs triton."""

import triton
import triton.language as tl

from ..common.triton_math import activate, dot, rounded


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
        acc_w = dot(a, b, acc_w, INTERPRETED)
        x_at += BLOCK_K * stride_xk
        w_at += BLOCK_K * stride_wk
        if v is not None:
            b = tl.load(v_at, mask=(rows < N) & (kw < K - start), other=0.0)
            acc_v = dot(a, b, acc_v, INTERPRETED)
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
    """A whole FFN for a few tokens: y = hidden · downᵀ, hidden = act(x · upᵀ) or act(x · gateᵀ) · (x · upᵀ).

    The first programs write hidden, a slice of d_ff each; the last ones wait for all of them and write y, a slice of
    its columns each. Every weight is read once, every sum has one fixed order. Naive loop: `reference.forward`.
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
            h *= activate(g, ACTIVATION)
        else:
            h = activate(h, ACTIVATION)
        h = rounded(h, hidden.dtype.element_ty, INTERPRETED)
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
            out = rounded(out, y.dtype.element_ty, INTERPRETED)
            tl.store(y + m * N + n[None, :], out, mask=(m < M) & (n < N)[None, :])
        if tl.atomic_add(counters + 1, 1) == readers - 1:  # for the next launch; nobody waits any more
            tl.store(counters, 0)
            tl.store(counters + 1, 0)
