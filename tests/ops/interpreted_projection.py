"""The Triton kernel of the projection op in Triton's interpreter; test_projection_triton.py starts it."""

import os

import pytest
import torch

from ffmerge_fast.ops.projection import op, triton_backend
from ffmerge_fast.projecting.matrices import ProjectedMatrix, gradients, project_
from tests.helpers import projection as data
from tests.helpers.projection_checks import check_rows, check_selection, check_wider_kept
from tests.ops.test_projection import SIDES, make, plain, with_gradients

assert os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("FFMERGE_BACKEND") == "triton"


@pytest.mark.parametrize("shape", data.SHAPES)
def test_two_times_rule(shape):
    check_rows(shape, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("shape", ["odd", "heads"])
@pytest.mark.parametrize("stored", ["columns", "gaps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strides_and_rounded_results(shape, stored, dtype):
    check_rows(shape, dtype, dtype, stored=stored)


@pytest.mark.parametrize("select, residual", [(True, False), (False, True), (False, False)])
def test_without_selection_or_residual(select, residual):
    check_rows("odd", torch.bfloat16, torch.float32, select=select, residual=residual)


@pytest.mark.parametrize("count", [2, 8, 11])
def test_groups(count):
    check_rows("heads", torch.bfloat16, torch.bfloat16, count=count)


def test_problems_at_odd_addresses_are_launched_alone():
    p = data.rows("odd", torch.bfloat16, count=3)
    p.xs = [torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(x.shape) for x in p.xs]
    assert any(x.data_ptr() % 16 for x in p.xs)
    outs = p.outs(31, torch.float32)
    triton_backend.project_rows_(outs, p.xs, p.deltas, p.indices, p.xs, p.residuals)
    for i, out in enumerate(outs):
        exact = data.projected(p, i, torch.float64)
        assert (out - exact).abs().max() <= 4e-3 * exact.abs().max()


@pytest.mark.parametrize("shape", data.SHAPES)
def test_selection_is_a_gather_bit_for_bit(shape):
    check_selection(shape, torch.bfloat16, "columns")
    check_wider_kept()


def test_float32_and_float64_are_torch():
    check_rows("odd", torch.float32, torch.float32)
    check_rows("odd", torch.float64, torch.float64)


@pytest.mark.parametrize("sides", SIDES)
def test_project_weight(sides):
    import ffmerge_fast as ff

    tensors = {name: None if t is None else t.bfloat16() for name, t in make(63, 100, 31, 50, sides).items()}
    ours = with_gradients(ff.ops.project_weight, tensors, torch.bfloat16)
    exact = with_gradients(plain, tensors, torch.float64)
    for found, wanted in zip(ours, exact, strict=True):
        assert (found.double() - wanted).abs().max() <= 1e-2 * wanted.abs().max()
    torch.library.opcheck(op._project_op, tuple(tensors.values()))


def test_split_projection_loses_little_of_what_was_learned():
    from tests.projecting.test_matrices import CASES, formula
    from tests.projecting.test_matrices import make as make_matrix

    for case in CASES:
        matrix, deltas, residual, grad = make_matrix(case, torch.bfloat16)
        parameter = torch.full(matrix.parameter.shape, torch.nan)
        matrix = ProjectedMatrix("w", parameter, matrix.weight, matrix.as_matrix, matrix.rows, matrix.columns)
        for delta in deltas.values():
            delta.requires_grad_()
        wanted = formula(matrix, deltas, residual)
        wanted.backward(grad)
        masters = {p: d.detach().float() for p, d in deltas.items()}
        inner = project_([matrix], masters, [residual.float()])
        assert (parameter - wanted).norm() <= 4e-3 * wanted.norm()
        for projection, gradient in gradients([matrix], masters, [grad.bfloat16()], inner):
            exact = deltas[projection].grad
            assert gradient.dtype == torch.float32 and (gradient - exact).norm() <= 1e-2 * exact.norm()
