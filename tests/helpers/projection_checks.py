"""Checks that every backend of the projection op passes, here and in Triton's interpreter."""

import torch

from ffmerge_fast.ops.projection import registered as ops
from ffmerge_fast.testing import assert_close_to_float64, nan_poisoned_empty
from tests.helpers import projection as data

FLOAT64 = torch.float64


def check_rows(shape, dtype, out_dtype, **options):
    """All three ops, by the 2x rule, twice with equal bits."""
    p = data.rows(shape, dtype, **options)
    blocks, r, n, m = data.SHAPES[shape]
    results = []
    for _ in range(2):
        ys, xs = p.outs(blocks * r, out_dtype), p.outs(blocks * n, out_dtype)
        gradients = [torch.full((blocks, r, n), torch.nan) for _ in p.xs]
        with nan_poisoned_empty():
            ops.project_rows_(ys, p.xs, p.deltas, p.indices, p.xs if p.indices else [], p.residuals)
            ops.project_rows_adjoint_(xs, p.ys, p.deltas, p.indices)
            ops.project_rows_gradient_(gradients, p.ys, p.xs)
        results.append([*ys, *xs, *gradients])
        for kind, found in ((data.projected, ys), (data.adjoint, xs), (data.gradient, gradients)):
            for i, value in enumerate(found):
                exact = kind(p, i, FLOAT64)
                if value.dtype == FLOAT64:
                    torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
                    continue
                floor = largest_sum(p, i, kind) * torch.finfo(value.dtype).eps / 2
                assert_close_to_float64(value, kind(p, i, dtype).to(value.dtype), exact, floor)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def largest_sum(p, i, kind):
    """The largest that a partial sum can be, in whatever order terms are added."""
    absolute = data.Rows(*([t.abs() for t in of] for of in (p.xs, p.ys, p.deltas)), p.indices,
                         [t.abs() for t in p.residuals], p.stored)  # fmt: skip
    return kind(absolute, i, FLOAT64).max().item()


def check_selection(shape, dtype, stored):
    """Where nothing is learned the result is the gather, bit for bit."""
    p = data.rows(shape, dtype, count=2, residual=False, stored=stored, learned=False)
    blocks, r, _, _ = data.SHAPES[shape]
    outs = p.outs(blocks * r, dtype)
    ops.project_rows_(outs, p.xs, p.deltas, p.indices, p.xs, [])
    for out, x, index in zip(outs, p.xs, p.indices, strict=True):
        assert torch.equal(out, x[index])


def check_wider_kept():
    """What S selects may be wider than what Δ multiplies: it is not rounded."""
    p = data.rows("odd", torch.bfloat16, learned=False, residual=False)
    kept = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in p.xs]
    outs = p.outs(31, torch.float32)
    ops.project_rows_(outs, p.xs, p.deltas, p.indices, kept, [])
    assert torch.equal(outs[0], kept[0][p.indices[0]])
