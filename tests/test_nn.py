"""The modules over the ops: same values and gradients as what they replace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ffmerge_fast as ff


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_shared_ffn_trains_like_its_linear_modules(gated, bias):
    torch.manual_seed(0)
    module = ff.nn.SharedFFN(12, 20, activation="silu", gated=gated, bias=bias, dtype=torch.float64)
    other = copy.deepcopy(module)
    xs = [torch.randn(5, 12, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)]
    for m, call in ((module, module), (other, lambda xs: [_plain(other, x) for x in xs])):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(3):
            loss = sum(y.square().sum() for y in call(xs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in other.named_parameters()]
    for ours, expected in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


def _plain(m, x):
    return m.down(F.silu(m.up(x)) if m.gate is None else F.silu(m.gate(x)) * m.up(x))


def test_shared_ffn_round_trips_its_state_dict():
    a, b = ff.nn.SharedFFN(6, 8, gated=True), ff.nn.SharedFFN(6, 8, gated=True)
    b.load_state_dict(a.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(a(x), b(x)) and "activation=gelu" in repr(a)
    assert {"up.weight", "gate.bias", "down.bias"} <= a.state_dict().keys()


def test_projected_linear_starts_hard_pruned_trains_only_projections_and_folds():
    torch.manual_seed(0)
    linear = nn.Linear(30, 40)
    rows, columns = torch.tensor([3, 5, 39]), torch.tensor([0, 7, 8, 29])
    module = ff.nn.ProjectedLinear(linear, out_index=rows, in_index=columns)
    x = torch.randn(6, 4)
    assert torch.equal(module(x), F.linear(x, linear.weight[rows][:, columns], linear.bias[rows]))
    assert {n for n, _ in module.named_parameters()} == {"p_out", "p_in", "residual", "residual_bias"}
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    before, frozen = F.mse_loss(module(x), torch.ones(6, 3)).item(), module.weight.clone()
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), torch.ones(6, 3))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * before and torch.equal(module.weight, frozen)
    folded = module.fold()
    assert type(folded) is nn.Linear and torch.equal(folded(x), module(x))


@pytest.mark.parametrize("bias", [False, True])
def test_projected_linear_of_one_side_without_residual(bias):
    linear = nn.Linear(30, 40, bias=bias)
    module = ff.nn.ProjectedLinear(linear, in_index=torch.arange(10, 30), residual=False)
    x = torch.randn(2, 3, 20)
    assert torch.equal(module(x), F.linear(x, linear.weight[:, 10:], linear.bias))
    assert [n for n, _ in module.named_parameters()] == ["p_in"]
