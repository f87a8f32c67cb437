"""Gradients of shared weights: added to one buffer by backward itself, or returned to autograd; always the same sum."""

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.shared_ffn import gradient_buffers
from ffmerge_fast.testing import assert_close_to_float64
from tests.helpers.shared_ffn import POLICIES, make, plain, plain_list, with_gradients

pytestmark = pytest.mark.usefixtures("shared_ffn_backend")


def parameters(gated=True, dtype=torch.float32):
    return {name: torch.nn.Parameter(w) for name, w in make(16, 32, gated, True, dtype).items()}


def layers(function, x, weights, count=3, **options):
    """A residual stream through `count` layers that share one FFN."""
    for _ in range(count):
        x = x + function(torch.nn.functional.layer_norm(x, x.shape[-1:]), **weights, **options)
    return x


def gradients(function, weights, x, **options):
    for w in weights.values():
        w.grad = None
    layers(function, x, weights, **options).square().mean().backward()
    return {n: w.grad.clone() for n, w in weights.items()}


@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [7, 700])
def test_tied_training_equals_autograd(recompute, gated, tokens):
    weights = parameters(gated)
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1))
    ours, expected = (
        gradients(f, weights, x, **o) for f, o in ((ff.ops.shared_ffn, {"recompute": recompute}), (plain, {}))
    )
    for name in weights:
        assert (ours[name] - expected[name]).abs().max() <= 1e-6 * max(1, expected[name].abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", POLICIES)
def test_low_precision_by_the_two_times_rule(dtype, recompute):
    weights = make(48, 100, True, True, dtype)
    xs = [torch.randn(n, 48, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (5, 600, 40)]
    ours = with_gradients(ff.ops.shared_ffn, xs, weights, recompute=recompute)
    same, true = (with_gradients(plain_list, xs, weights, d) for d in (dtype, torch.float64))
    for kernel, torch_same, float64 in zip(ours, same, true, strict=True):
        assert_close_to_float64(kernel, torch_same, float64)


def test_micro_batches_are_added_to_one_buffer():
    weights = parameters()
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn(9, 16, generator=g) for _ in range(3)]
    for x in batches[:1]:
        layers(ff.ops.shared_ffn, x, weights).square().mean().backward()
    places = {n: w.grad.data_ptr() for n, w in weights.items()}
    for x in batches[1:]:
        layers(ff.ops.shared_ffn, x, weights).square().mean().backward()
    assert places == {n: w.grad.data_ptr() for n, w in weights.items()}
    ours = {n: w.grad.clone() for n, w in weights.items()}
    each = [gradients(plain, weights, x) for x in batches]
    for name in weights:
        torch.testing.assert_close(ours[name], sum(e[name] for e in each))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_is_the_sum_in_float32(dtype):
    weights = parameters(dtype=dtype)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    for w in weights.values():
        w.main_grad = torch.ones(w.shape)
    layers(ff.ops.shared_ffn, x, weights).square().mean().backward()
    assert all(w.grad is None and w.grad_added_to_main_grad for w in weights.values())
    ours = {n: w.main_grad - 1 for n, w in weights.items()}
    for w in weights.values():
        del w.main_grad
    expected = gradients(plain, weights, x)
    for name in weights:
        tolerance = 1e-6 if dtype == torch.float32 else 0.05 * expected[name].abs().max()
        assert (ours[name] - expected[name]).abs().max() <= tolerance
        assert dtype == torch.float32 or not torch.equal(ours[name], ours[name].bfloat16().float())


def test_weights_kept_transposed_are_filled_in_their_own_layout():
    straight = make(16, 32, False, False)
    kept = {n: torch.nn.Parameter(w.T.contiguous()) for n, w in straight.items()}
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    views = {n: w.T for n, w in kept.items()}
    assert all(gradient_buffers.gradient_buffer(v) is None for v in views.values())  # no backward is running
    layers(ff.ops.shared_ffn, x, views).square().mean().backward()
    expected = gradients(plain, {n: torch.nn.Parameter(w) for n, w in straight.items()}, x)
    for name, w in kept.items():
        assert w.grad.is_contiguous()
        torch.testing.assert_close(w.grad, expected[name].T)


def test_autograd_grad_returns_gradients_and_fills_nothing():
    weights = parameters()
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = layers(ff.ops.shared_ffn, x, weights).square().mean()
    ours = torch.autograd.grad(loss, [x, *weights.values()])
    expected = torch.autograd.grad(layers(plain, x, weights).square().mean(), [x, *weights.values()])
    assert all(t.grad is None for t in (x, *weights.values()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    layers(ff.ops.shared_ffn, x, weights).square().mean().backward(inputs=[x])
    assert x.grad is not None and all(w.grad is None for w in weights.values())


def test_hooks_and_create_graph_get_their_gradients():
    weights = parameters()
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    expected = gradients(plain, weights, x)
    seen, after = [], []
    weights["up"].register_hook(lambda g: seen.append(g.clone()))
    weights["down"].register_post_accumulate_grad_hook(lambda w: after.append(w.grad.clone()))
    gradients(ff.ops.shared_ffn, weights, x)
    torch.testing.assert_close(seen[0], expected["up"])
    torch.testing.assert_close(after[0], expected["down"])
    free = parameters()
    layers(ff.ops.shared_ffn, x, free, count=1).square().mean().backward(create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        free["up"].grad.sum().backward()


def test_a_weight_used_outside_too_gets_both_parts():
    weights = parameters()
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (ff.ops.shared_ffn, plain):
        for w in weights.values():
            w.grad = None
        y = function(x @ weights["up"].T @ weights["up"], **weights)
        (y.square().mean() + weights["down"].square().sum()).backward()
        results.append({n: w.grad.clone() for n, w in weights.items()})
    for name in weights:
        torch.testing.assert_close(*(result[name] for result in results))


def test_checkpointing_and_saved_tensor_hooks():
    weights = parameters()
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = gradients(plain, weights, x)

    def run(x):
        return layers(ff.ops.shared_ffn, x, weights)

    for reentrant in (False, True):
        for w in weights.values():
            w.grad = None
        torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant).square().mean().backward()
        for name, w in weights.items():
            torch.testing.assert_close(w.grad, expected[name])
    for w in weights.values():
        w.grad = None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = run(x).square().mean()
    loss.backward()
    for name, w in weights.items():
        torch.testing.assert_close(w.grad, expected[name])
