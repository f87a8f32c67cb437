"""Arithmetic that kernels of several ops share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, NAME: tl.constexpr):
    if NAME == "relu":
        x = tl.where(x < 0, 0.0, x)  # not maximum: NaN must stay
    elif NAME == "relu2":
        x = tl.where(x < 0, 0.0, x) * x
    elif NAME == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid(2u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(NAME == "none")
    return x


@triton.jit
def to_bfloat16(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # to nearest even, by hand
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def pick(pointers, index):
    """pointers[index] of a tuple of 16-byte aligned pointers, as the first one plus a distance: a chain of selects."""
    origin = pointers[0].to(tl.int64)
    distance = tl.zeros((), tl.int64)
    for i in tl.static_range(1, len(pointers)):
        distance = tl.where(index == i, pointers[i].to(tl.int64) - origin, distance)
    SIZE: tl.constexpr = pointers[0].dtype.element_ty.primitive_bitwidth // 8
    return pointers[0] + distance // 16 * (16 // SIZE)  # the compiler sees the alignment only in this form


@triton.jit
def derivative(x, NAME: tl.constexpr):
    """Of `activate`, the same expressions differentiated by hand."""
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
def dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    if dtype == tl.bfloat16 and x.dtype == tl.float32:
        x = to_bfloat16(x, INTERPRETED)
    return x.to(dtype)
