"""The ops that project rows, on every backend and instruction set of the machine."""

import pytest
import torch

from ffmerge_fast.ops.projection import registered as ops
from tests.helpers import projection as data
from tests.helpers.projection_checks import check_rows, check_selection, check_wider_kept

pytestmark = pytest.mark.usefixtures("op_backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STORED = ["rows", "columns", "gaps"]


@pytest.mark.parametrize("shape", data.SHAPES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_times_rule(shape, stored, dtype):
    check_rows(shape, dtype, dtype, stored=stored)


@pytest.mark.parametrize("select, residual", [(True, False), (False, True), (False, False)])
def test_without_selection_or_residual(select, residual):
    check_rows("odd", torch.float32, torch.float32, select=select, residual=residual)
    check_rows("heads", torch.bfloat16, torch.float32, select=select, residual=residual)


def test_many_problems_of_one_shape():
    check_rows("odd", torch.float32, torch.float32, count=3)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", data.SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_is_a_gather_bit_for_bit(shape, stored, dtype):
    check_selection(shape, dtype, stored)


def test_what_is_selected_may_be_wider():
    check_wider_kept()


def test_threads_change_no_bit_of_the_selection():
    p = data.rows("tiles and tails", torch.float32, learned=False)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outs = p.outs(130, torch.float32)
            ops.project_rows_(outs, p.xs, p.deltas, p.indices, p.xs, p.residuals)
            found.append(outs[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_opcheck():
    p = data.rows("heads", torch.float32, count=2)
    blocks, r, n, _ = data.SHAPES["heads"]
    zeros = [torch.zeros_like(t) for t in p.ys], [torch.zeros_like(t) for t in p.xs]
    gradients = [torch.zeros(blocks, r, n) for _ in p.xs]
    torch.library.opcheck(ops.project_rows_, (zeros[0], p.xs, p.deltas, p.indices, p.xs, p.residuals))
    torch.library.opcheck(ops.project_rows_adjoint_, (zeros[1], p.ys, p.deltas, p.indices))
    torch.library.opcheck(ops.project_rows_gradient_, (gradients, p.ys, p.xs))
