"""Gradients that arrive in leaves: what else waits for them there, and what may go wrong before they arrive."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ffmerge_fast as ff
from tests.helpers.shared_ffn import make, plain
from tests.ops.test_shared_ffn_gradients import gradients, layers, parameters

pytestmark = pytest.mark.usefixtures("shared_ffn_backend")
OPS = (ff.ops.shared_ffn, plain)


@pytest.fixture
def x():
    return torch.randn(9, 16, generator=torch.Generator().manual_seed(1))


def assert_all_close(ours, expected):
    assert len(ours) == len(expected)
    for name in expected if isinstance(expected, dict) else range(len(expected)):
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=2e-6 * largest, msg=str(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_leaves_get_the_sum_of_all_calls_rounded_once(dtype):
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(9, 16, generator=g).to(dtype) for _ in range(60)]

    def summed(function, dtype):
        weights = {n: torch.nn.Parameter(w.detach().to(dtype)) for n, w in low.items()}
        sum(function(x.to(dtype), **weights).double().square().sum() for x in inputs).backward()
        return {n: w.grad for n, w in weights.items()}

    low = parameters(dtype=dtype)
    ours, autograd, true = summed(ff.ops.shared_ffn, dtype), summed(plain, dtype), summed(plain, torch.float64)
    for name, expected in true.items():
        assert ours[name].dtype == dtype
        assert (ours[name] - expected).norm() < 0.7 * (autograd[name] - expected).norm(), name


def test_hooks_see_one_whole_gradient(x):
    """post-accumulate hooks; and hooks of the node behind a leaf, which DDP installs and Python does not list."""
    seen = []
    for function in OPS:
        weights = parameters()
        found, nodes = {}, []
        for name, w in weights.items():
            node = torch.autograd.graph.get_gradient_edge(w).node
            node.register_hook(lambda *_, w=w, n=name, f=found: f.setdefault(f"node of {n}", []).append(w.grad.clone()))
            nodes.append(node)  # a leaf does not keep it
            w.register_post_accumulate_grad_hook(lambda w, n=name, f=found: f.setdefault(n, []).append(w.grad.clone()))
        layers(function, x, weights).square().mean().backward()
        assert all(len(calls) == 1 for calls in found.values()) and len(found) == 2 * len(weights)
        seen.append({name: calls[0] for name, calls in found.items()})
    assert_all_close(*seen)


def test_an_optimizer_in_backward(x):
    results = []
    for function in OPS:
        weights = parameters()

        def step(w):
            with torch.no_grad():
                w -= 0.1 * w.grad
            w.grad = None

        for w in weights.values():
            w.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            layers(function, x, weights).square().mean().backward()
        results.append({n: w.detach() for n, w in weights.items()})
    assert_all_close(*results)


def test_one_parameter_in_several_places(x):
    results = []
    for function in OPS:
        w = torch.nn.Parameter(make(16, 32, False, False)["up"])
        inputs = x.clone().requires_grad_()
        y = function(inputs, w, w.T, w) + function(w, w, w.T).sum() + (x @ w.T).sum()  # and tokens that are its rows
        y.square().mean().backward()
        results.append([w.grad, inputs.grad])
    assert_all_close(*results)


@pytest.mark.parametrize("kept", [False, True])
def test_a_second_backward_adds_the_same_again(x, kept):
    weights = parameters()
    loss = layers(ff.ops.shared_ffn, x, weights).square().mean()
    loss.backward(retain_graph=True)
    once = {n: w.grad.clone() for n, w in weights.items()}
    if not kept:
        for w in weights.values():
            w.grad = None
    loss.backward()
    assert_all_close({n: w.grad for n, w in weights.items()}, {n: g * (1 + kept) for n, g in once.items()})
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_what_a_failed_backward_summed_is_forgotten(x):
    weights = parameters()
    expected = gradients(plain, weights, x)
    nodes = [torch.autograd.graph.get_gradient_edge(w).node for w in weights.values()]  # as DDP keeps them

    def fail(gradient):
        raise ArithmeticError

    for w in weights.values():
        w.grad = None
    y = layers(ff.ops.shared_ffn, x, weights, count=1)
    y.register_hook(fail)  # when the later layers have added their part, and the first has not
    with pytest.raises(ArithmeticError):
        layers(ff.ops.shared_ffn, y, weights, count=2).square().mean().backward()
    assert len(nodes) == len(weights) and all(w.grad is None for w in weights.values())
    assert_all_close(gradients(ff.ops.shared_ffn, weights, x), expected)


def test_a_backward_within_a_backward_keeps_its_own_sum(x):
    """Re-entrant checkpointing, between two other uses of the weights."""
    weights = parameters()
    expected = gradients(plain, weights, x, count=4)
    for w in weights.values():
        w.grad = None
    y = layers(ff.ops.shared_ffn, x.clone().requires_grad_(), weights, count=1)
    y = checkpoint(lambda y: layers(ff.ops.shared_ffn, y, weights, count=2), y, use_reentrant=True)
    layers(ff.ops.shared_ffn, y, weights, count=1).square().mean().backward()
    assert_all_close({n: w.grad for n, w in weights.items()}, expected)


def test_backward_to_some_leaves_only(x):
    weights = parameters()
    expected = gradients(plain, weights, x)
    for w in weights.values():
        w.grad = None
    layers(ff.ops.shared_ffn, x, weights).square().mean().backward(inputs=[weights["up"], weights["down_bias"]])
    filled = {n: w.grad for n, w in weights.items() if w.grad is not None}
    assert_all_close(filled, {n: expected[n] for n in ("up", "down_bias")})


def test_the_sum_becomes_the_gradient_without_a_copy(x, monkeypatch):
    weights = parameters()
    made, zeros_like = [], torch.zeros_like

    def noted(*args, **options):
        zeros = zeros_like(*args, **options)
        made.append(zeros.data_ptr())
        return zeros

    monkeypatch.setattr(torch, "zeros_like", noted)
    layers(ff.ops.shared_ffn, x, weights).square().mean().backward()
    assert sorted(made) == sorted(w.grad.data_ptr() for w in weights.values())


def test_a_main_grad_of_another_kind_is_left_alone(x):
    weights = parameters()
    expected = gradients(plain, weights, x)
    for w in weights.values():
        w.grad, w.main_grad, w.grad_added_to_main_grad = None, torch.zeros(w.shape, dtype=torch.bfloat16), False
    layers(ff.ops.shared_ffn, x, weights).square().mean().backward()
    assert_all_close({n: w.grad for n, w in weights.items()}, expected)
    assert not any(w.main_grad.any() or w.grad_added_to_main_grad for w in weights.values())


def test_a_weight_changed_before_backward_is_an_error_and_after_it_is_used(x):
    weights = parameters()
    loss = ff.ops.shared_ffn(x, **weights).square().mean()
    with torch.no_grad():
        weights["down"] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for w in weights.values():
        w.grad = None
    assert_all_close(gradients(ff.ops.shared_ffn, weights, x), gradients(plain, weights, x))


def test_outputs_may_be_changed_in_place():
    results = []
    for function in OPS:
        weights = parameters()
        y = function(torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)), **weights)
        assert function is plain or not y._is_view()
        y.mul_(2).add_(1)
        y.square().mean().backward()
        results.append({n: w.grad for n, w in weights.items()})
    assert_all_close(*results)
