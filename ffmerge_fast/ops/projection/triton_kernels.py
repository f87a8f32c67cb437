"""The Triton kernel of the `projection` op. Imported on first use: it needs triton.

INTERPRETED marks what Triton's interpreter (3.9) gets wrong: it truncates to bfloat16, and multiplies bfloat16 wrongly.
"""

import triton
import triton.language as tl

from ..common.triton_math import pick, rounded

GROUP = 8  # problems of a launch; their addresses are arguments, so that nothing is copied to the device


@triton.jit
def _project_rows_kernel(
    a,  # pointers: [B, M, K] float32, or as b
    b,  # [B, K, N] bfloat16 or float16
    out,  # [B, M, N]
    index,  # [B, M] int64: which row of kept is added, -1 for none (SELECT)
    kept,  # [., N]
    residual,  # [B, M, N] (RESIDUAL)
    blocks,
    M,
    N,
    K,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bk,
    stride_bn,
    stride_ob,
    stride_om,
    stride_on,
    stride_km,
    stride_kn,
    stride_rb,
    stride_rm,
    stride_rn,
    SELECT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out = a · b + kept[index] + residual for problems of one shape, summed in float32 and rounded once.

    One program, one tile of one block of one problem: every sum has one fixed order.
    Naive loops: `reference.project_rows_`, `project_rows_adjoint_`, `project_rows_gradient_`.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    tile = program % (tiles_m * tiles_n)
    block = program // (tiles_m * tiles_n)
    problem = block // blocks
    block = (block % blocks).to(tl.int64)
    # Eight rows of tiles at a time: what they read of b stays in the cache.
    first = tile // (8 * tiles_n) * 8
    height = tl.minimum(tiles_m - first, 8)
    inside_group = tile % (8 * tiles_n)
    m = (first + inside_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = inside_group // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m64 = m.to(tl.int64)[:, None]
    n64 = n.to(tl.int64)[None, :]
    rows = (m < M)[:, None]
    columns = (n < N)[None, :]

    x_at = pick(a, problem) + block * stride_ab + m64 * stride_am + k[None, :].to(tl.int64) * stride_ak
    y_at = pick(b, problem) + block * stride_bb + k[:, None].to(tl.int64) * stride_bk + n64 * stride_bn
    dtype: tl.constexpr = b[0].dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_at, mask=rows & (k[None, :] < K - start), other=0.0)
        y = tl.load(y_at, mask=columns & (k[:, None] < K - start), other=0.0)
        x = rounded(x, dtype, INTERPRETED)
        if INTERPRETED:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        acc = tl.dot(x, y, acc)
        x_at += BLOCK_K * stride_ak
        y_at += BLOCK_K * stride_bk

    inside = rows & columns
    if SELECT:
        chosen = tl.load(pick(index, problem) + block * M + m, mask=m < M, other=-1)[:, None]
        at = pick(kept, problem) + chosen * stride_km + n64 * stride_kn
        acc += tl.load(at, mask=inside & (chosen >= 0), other=0.0).to(tl.float32)
    if RESIDUAL:
        at = pick(residual, problem) + block * stride_rb + m64 * stride_rm + n64 * stride_rn
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = pick(out, problem) + block * stride_ob + m64 * stride_om + n64 * stride_on
    tl.store(at, rounded(acc, out[0].dtype.element_ty, INTERPRETED), mask=inside)
