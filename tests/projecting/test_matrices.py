"""W_C = P_out W P_in + R and its chain rule against float64 autograd of the formula."""

import pytest
import torch

from ffmerge_fast.ops.projection.chain import rows_first
from ffmerge_fast.projecting.matrices import ProjectedMatrix, Projection, gradients, project_
from ffmerge_fast.projecting.selection import Choice
from ffmerge_fast.support import machine


def choice(blocks, kept_blocks, width, kept, g):
    inner = torch.stack([torch.randperm(width, generator=g)[:kept].sort().values for _ in range(kept_blocks)])
    return Choice(torch.randperm(blocks, generator=g)[:kept_blocks].sort().values, inner, width)


def dense(projection, delta, n):
    """S + Δ as one matrix [r, n]."""
    p = torch.zeros(len(projection.choice), n, dtype=delta.dtype)
    p[torch.arange(len(p)), projection.choice.index] = 1
    blocks, kept, width = projection.shape
    for b in range(blocks):
        first = int(projection.choice.block[b]) * width
        p[b * kept : (b + 1) * kept, first : first + width] += delta[b]
    return p


CASES = {  # (blocks, kept blocks, width, kept) of rows and columns; None: that axis is not projected
    "both, rows first": ((1, 1, 63, 5), (1, 1, 31, 30)),
    "both, columns first": ((1, 1, 31, 30), (1, 1, 63, 5)),
    "rows": ((1, 1, 40, 17), None),
    "columns": (None, (1, 1, 40, 17)),
    "fewer heads": ((6, 4, 8, 8), (1, 1, 20, 9)),
    "narrower heads": ((6, 6, 8, 5), (1, 1, 20, 9)),
    "one head of several": ((1, 1, 20, 9), (4, 1, 8, 8)),
    "one to one": ((1, 1, 1, 1), (1, 1, 7, 1)),
}


def make(case, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows, columns = (None if c is None else Projection("w", name, choice(*c, g)) for name, c in
                     zip(("p_out", "p_in"), CASES[case], strict=True))  # fmt: skip
    out, in_ = (11 if c is None else c[0] * c[2] for c in CASES[case])
    r_out, r_in = (11 if p is None else len(p.choice) for p in (rows, columns))
    weight = torch.randn(out, in_, generator=g, dtype=torch.float64).to(dtype)
    parameter = torch.full((r_out, r_in), torch.nan, dtype=dtype)
    deltas = {p: 0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64) for p in (rows, columns) if p}
    residual = torch.randn(r_out, r_in, generator=g, dtype=torch.float64)
    grad = torch.randn(r_out, r_in, generator=g, dtype=torch.float64)
    matrix = ProjectedMatrix("w", parameter, weight, lambda t: t, rows, columns)
    return matrix, deltas, residual, grad


def formula(matrix, deltas, residual):
    value = matrix.weight.double()
    if matrix.rows:
        value = dense(matrix.rows, deltas[matrix.rows], len(value)) @ value
    if matrix.columns:
        value = value @ dense(matrix.columns, deltas[matrix.columns], value.shape[1]).T
    return value + residual


@pytest.fixture(params=["reference", "cpp", "cpp amx-emulated"])
def backend(request, monkeypatch):
    name, _, isa = request.param.partition(" ")
    if name == "cpp" and (reason := machine.why_no_extension()):
        pytest.skip(reason)
    monkeypatch.setenv("FFMERGE_BACKEND", name)
    if isa:
        monkeypatch.setenv("FFMERGE_CPU_ISA", isa)
    return request.param


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradients(case, dtype, backend):
    matrix, deltas, residual, grad = make(case, dtype)
    for delta in deltas.values():
        delta.requires_grad_()
    residual.requires_grad_()
    wanted = formula(matrix, deltas, residual)
    wanted.backward(grad)
    masters = {p: d.detach().to(dtype) for p, d in deltas.items()}
    inner = project_([matrix], masters, [residual.detach().to(dtype)])
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrix.parameter.double(), wanted.detach(), **tolerance)
    found = gradients([matrix], masters, [grad.to(dtype)])
    assert {p for p, _ in found} == set(deltas) and bool(inner) == (len(deltas) == 2)
    for (projection, gradient), (_, again) in zip(
        found, gradients([matrix], masters, [grad.to(dtype)], inner), strict=True
    ):
        assert torch.equal(gradient, again)
        assert gradient.dtype == dtype and gradient.shape == projection.shape
        torch.testing.assert_close(gradient.double(), deltas[projection].grad, **tolerance)
    assert torch.equal(residual.grad, grad)


def test_a_parameter_that_is_stored_transposed():
    """As in GPT-2's Conv1D: [in, out]."""
    matrix, deltas, residual, grad = make("both, rows first", torch.float32)
    stored = torch.full(matrix.parameter.T.shape, torch.nan)
    turned = ProjectedMatrix("w", stored, matrix.weight.T.contiguous(), lambda t: t.T, matrix.rows, matrix.columns)
    masters = {p: d.float() for p, d in deltas.items()}
    inner = [project_([m], masters, [residual.float()]) for m in (matrix, turned)]
    torch.testing.assert_close(stored.T, matrix.parameter)
    found = [gradients([m], masters, [grad.float()], i) for m, i in zip((matrix, turned), inner, strict=True)]
    for (_, ours), (_, theirs) in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_cheaper_order_is_chosen():
    for case, first in (("both, rows first", True), ("both, columns first", False)):
        matrix, deltas, *_ = make(case, torch.float64)
        assert rows_first(matrix.problem(deltas)) is first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_without_anything_learned_it_is_a_gather(case, dtype, backend):
    matrix, deltas, residual, _ = make(case, dtype)
    project_([matrix], {p: torch.zeros_like(d, dtype=torch.float32) for p, d in deltas.items()})
    kept = matrix.weight
    kept = kept[matrix.rows.choice.index] if matrix.rows else kept
    kept = kept[:, matrix.columns.choice.index] if matrix.columns else kept
    assert torch.equal(matrix.parameter, kept)


def test_bfloat16_loses_little_of_what_was_learned(backend):
    """PERF.md's reason for P = S + Δ: 4.8 % of the update is lost with P itself in bfloat16, 0.24 % split."""
    g = torch.Generator().manual_seed(0)
    n, r = 256, 128
    rows, columns = (Projection("w", e, choice(1, 1, n, r, g)) for e in ("p_out", "p_in"))
    weight = (torch.randn(n, n, generator=g) * 0.02).bfloat16()
    parameter = torch.zeros(r, r)  # in float32, so that only the products round
    matrix = ProjectedMatrix("w", parameter, weight, lambda t: t, rows, columns)
    deltas = {p: torch.randn(p.shape, generator=g) * 1e-3 for p in (rows, columns)}
    kept = weight.double()[rows.choice.index][:, columns.choice.index]
    update = formula(matrix, {p: d.double() for p, d in deltas.items()}, 0) - kept
    project_([matrix], deltas)
    assert (parameter.double() - kept - update).norm() / update.norm() < 5e-3
