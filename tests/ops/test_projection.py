"""Projected weights against plain PyTorch in float64: values, gradients, orders, the step-0 selection."""

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.projection import op
from ffmerge_fast.testing import assert_close_to_float64, nan_poisoned_empty, no_recompile

pytestmark = pytest.mark.usefixtures("op_backend")
SHAPES = [(1, 1, 1, 1), (63, 100, 31, 50), (100, 63, 90, 7), (431, 64, 16, 64)]  # out, in, r_out, r_in
SIDES = [(True, True), (True, False), (False, True)]


def make(out, in_, r_out, r_in, sides=(True, True), residual=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {"weight": torch.randn(out, in_, generator=g)}
    tensors["p_out"] = torch.randn(r_out, out, generator=g) / out**0.5 if sides[0] else None
    tensors["p_in"] = torch.randn(in_, r_in, generator=g) / in_**0.5 if sides[1] else None
    shape = (r_out if sides[0] else out, r_in if sides[1] else in_)
    tensors["residual"] = torch.randn(shape, generator=g) if residual else None
    return tensors


def plain(weight, p_out=None, p_in=None, residual=None):
    if p_in is not None:
        weight = weight @ p_in
    if p_out is not None:
        weight = p_out @ weight
    return weight if residual is None else weight + residual


def with_gradients(function, tensors, dtype):
    tensors = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    trained = [t.requires_grad_() for name, t in tensors.items() if t is not None and name != "weight"]
    y = function(**tensors)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    return [y, *torch.autograd.grad(y, trained, g)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_times_rule_on_values_and_gradients(shape, sides, dtype):
    tensors = {name: None if t is None else t.to(dtype) for name, t in make(*shape, sides).items()}
    with nan_poisoned_empty():
        ours = with_gradients(ff.ops.project_weight, tensors, dtype)
    same, true = (with_gradients(plain, tensors, t) for t in (dtype, torch.float64))
    for kernel, torch_same, float64 in zip(ours, same, true, strict=True):
        assert_close_to_float64(kernel, torch_same, float64)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("shape", [(5, 4, 2, 3), (3, 6, 3, 2), (6, 3, 2, 3)])
def test_gradcheck(sides, shape):
    tensors = {name: None if t is None else t.double() for name, t in make(*shape, sides).items()}
    weight = tensors.pop("weight")
    names = [name for name, t in tensors.items() if t is not None]
    function = lambda *given: ff.ops.project_weight(weight, **dict(zip(names, given, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])


def test_both_orders_agree_and_the_cheaper_one_runs():
    for shape, first in [((64, 16, 8, 16), True), ((16, 64, 16, 8), False)]:
        t = make(*shape)
        projected, inner = op._project_op(t["weight"], t["p_out"], t["p_in"], None)
        assert torch.equal(ff.ops.project_weight(t["weight"], t["p_out"], t["p_in"]), projected)
        torch.testing.assert_close(projected, t["p_out"] @ (t["weight"] @ t["p_in"]))
        torch.testing.assert_close(projected, (t["p_out"] @ t["weight"]) @ t["p_in"])
        torch.testing.assert_close(inner, t["p_out"] @ t["weight"] if first else (t["weight"] @ t["p_in"]).T)
        out, in_, r_out, r_in = shape
        assert inner.numel() == min(out * r_in, r_out * in_)


def test_selection_is_a_gather_bit_for_bit_and_the_weight_gets_no_gradient():
    weight = torch.randn(100, 63, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows, columns = torch.randperm(100)[:40].sort().values, torch.randperm(63)[:31].sort().values
    p_out = torch.eye(100)[rows].requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        w = weight.to(dtype)
        projected = ff.ops.project_weight(w, p_out, torch.eye(63)[:, columns], torch.zeros(40, 31))
        assert torch.equal(projected, w[rows][:, columns])
    projected.sum().backward()
    assert weight.grad is None and p_out.grad.any()


def test_float32_masters_of_a_bfloat16_weight():
    t = make(63, 100, 31, 50)
    weight = t.pop("weight").bfloat16()
    y = ff.ops.project_weight(weight, **{name: value.requires_grad_() for name, value in t.items()})
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and all(value.grad.dtype == torch.float32 for value in t.values())
    expected = plain(weight.double(), *(value.detach().double() for value in t.values()))
    assert ((y.detach() - expected).abs().max() / expected.abs().max()) < 0.01


def test_autocast_and_strides_change_no_bit():
    t = make(63, 100, 31, 50)
    expected = ff.ops.project_weight(**t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ff.ops.project_weight(**t), expected)
    strided = {name: value.T.contiguous().T for name, value in t.items()}
    torch.testing.assert_close(ff.ops.project_weight(**strided), expected)


@pytest.mark.parametrize("sides", SIDES)
def test_opcheck(sides):
    t = make(6, 5, 4, 3, sides)
    arguments = tuple(t.values())
    torch.library.opcheck(op._project_op, arguments)
    projected, inner = op._project_op(*arguments)
    torch.library.opcheck(op._backward_op, (projected, *arguments[:3], inner))


def test_compiles_whole():
    t = make(63, 100, 31, 50)
    compiled = torch.compile(ff.ops.project_weight, backend="aot_eager", fullgraph=True)
    for kernel, eager in zip(
        with_gradients(compiled, t, torch.float32), with_gradients(ff.ops.project_weight, t, torch.float32), strict=True
    ):
        assert torch.equal(kernel, eager)
    with no_recompile():
        with_gradients(compiled, make(63, 100, 31, 50, seed=1), torch.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"p_out": None, "p_in": None}, "both are None; give at least one"),
        ({"p_out": torch.zeros(4, 5)}, r"p_out: got shape \[4, 5\], want \['r', 6\]"),
        ({"p_in": torch.zeros(6, 3)}, r"p_in: got shape \[6, 3\], want \[5, 'r'\]"),
        ({"residual": torch.zeros(3, 4)}, r"residual: got shape \[3, 4\], want \[4, 3\]"),
        ({"p_in": torch.zeros(5, 3, dtype=torch.int64)}, "p_in: got torch.int64 on cpu"),
        ({"weight": torch.zeros(6)}, r"weight: got torch.float32 \[6\]"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ff.FFMergeError, match=message) as error:
        ff.ops.project_weight(**{**make(6, 5, 4, 3), **change})
    assert "\n" not in str(error.value)
