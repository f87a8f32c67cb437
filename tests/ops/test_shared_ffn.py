"""The shared FFN op against plain PyTorch in float64: values, every gradient, policies, autocast, compile."""

from itertools import product

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.shared_ffn import registered
from ffmerge_fast.testing import assert_close_to_float64, nan_poisoned_empty, no_recompile
from tests.helpers.shared_ffn import ACTIVATIONS, POLICIES, make, plain, plain_list, with_gradients


def joined(results, inputs):
    """Outputs of all tokens as one tensor, and the gradients of the inputs, then those of the weights."""
    # The op stacks small inputs; torch's GEMM of 101 tokens errs 1.64 times as much as its GEMV of one (AVX-512).
    return [torch.cat(results[:inputs]), torch.cat(results[inputs : 2 * inputs]), *results[2 * inputs :]]


@pytest.mark.parametrize("gated, bias", list(product([False, True], repeat=2)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", POLICIES)
def test_two_times_rule_on_values_and_gradients(gated, bias, dtype, recompute, shared_ffn_backend):
    weights = make(63, 100, gated, bias, dtype)
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(tokens, 63, generator=g).to(dtype) for tokens in (1, 100, 431)]
    options = {"activation": "silu" if gated else "gelu"}
    with nan_poisoned_empty():
        ours = with_gradients(ff.ops.shared_ffn, xs, weights, recompute=recompute, **options)
    same = with_gradients(plain_list, xs, weights, **options)
    true = with_gradients(plain_list, xs, weights, torch.float64, **options)
    for kernel, torch_same, float64 in zip(*(joined(results, len(xs)) for results in (ours, same, true)), strict=True):
        assert_close_to_float64(kernel, torch_same, float64)


def test_weight_gradients_of_many_bfloat16_inputs_are_summed_in_float32(shared_ffn_backend):
    weights = make(16, 32, False, True, torch.bfloat16)
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(20, 16, generator=g).bfloat16() for _ in range(60)]
    ours = with_gradients(ff.ops.shared_ffn, xs, weights)[-4:]
    one_by_one = with_gradients(plain_list, xs, weights)[-4:]
    true = with_gradients(plain_list, xs, weights, torch.float64)[-4:]
    for a, b, t in zip(ours, one_by_one, true, strict=True):
        assert (a.double() - t).norm() < 0.7 * (b.double() - t).norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(activation, gated):
    weights = make(3, 4, gated, True, torch.float64)
    names = list(weights)
    xs = [torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)]
    for recompute in POLICIES:

        def function(*tensors, recompute=recompute):
            given = dict(zip(names, tensors[2:], strict=True))
            return tuple(ff.ops.shared_ffn(list(tensors[:2]), **given, activation=activation, recompute=recompute))

        assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in (*xs, *weights.values())])


def test_input_shapes_agree(shared_ffn_backend):
    weights = make(12, 20, True, True)
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2))
    y = ff.ops.shared_ffn(x, **weights, activation="silu")
    assert y.shape == x.shape
    torch.testing.assert_close(y, plain(x, **weights, activation="silu"))
    for i, part in enumerate(ff.ops.shared_ffn(list(x), **weights, activation="silu")):
        torch.testing.assert_close(part, y[i])
    torch.testing.assert_close(ff.ops.shared_ffn(x[0, 0], **weights, activation="silu"), y[0, 0])
    assert ff.ops.shared_ffn([], **weights) == []
    transposed = x.transpose(0, 2).contiguous().transpose(0, 2)
    strided = {name: w.T.contiguous().T if w.ndim == 2 else w for name, w in weights.items()}
    torch.testing.assert_close(ff.ops.shared_ffn(transposed, **strided, activation="silu"), y)


@pytest.mark.parametrize("recompute", POLICIES)
def test_zero_tokens(recompute, shared_ffn_backend):
    weights = make(12, 20, True, True)
    results = with_gradients(ff.ops.shared_ffn, [torch.empty(0, 12)], weights, recompute=recompute)
    assert results[0].shape == results[1].shape == (0, 12)
    assert all(not gradient.any() for gradient in results[2:])


@pytest.mark.parametrize("recompute", POLICIES)
def test_empty_groups_between_others(recompute, shared_ffn_backend):
    weights = make(12, 20, True, True)
    g = torch.Generator().manual_seed(2)
    xs = [torch.randn(tokens, 12, generator=g) for tokens in (0, 5, 0, 3, 0)]
    ours = with_gradients(ff.ops.shared_ffn, xs, weights, recompute=recompute)
    for a, b in zip(ours, with_gradients(plain_list, xs, weights), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("recompute", POLICIES)
def test_inputs_that_share_memory_with_each_other_and_the_weights(recompute, shared_ffn_backend):
    results = []
    for function, options in ((ff.ops.shared_ffn, {"recompute": recompute}), (plain_list, {})):
        weights = {n: w.requires_grad_() for n, w in make(12, 20, True, True).items()}
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2), requires_grad=True)
        ys = function([x, x, x[1:3], x.flip(0), weights["up"], weights["gate"][:4]], **weights, **options)
        torch.cat(ys).square().sum().backward()
        results.append([*ys, x.grad, *(w.grad for w in weights.values())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_inference_mode(shared_ffn_backend):
    weights = {name: w.requires_grad_() for name, w in make(12, 20, True, True).items()}
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = ff.ops.shared_ffn(x, **weights)
    with torch.inference_mode():
        y = ff.ops.shared_ffn(x, **weights)
        again = ff.ops.shared_ffn([y, y[0]], **{name: w.clone() for name, w in weights.items()})
    assert y.is_inference() and torch.equal(y, expected) and again[0].is_inference()
    torch.testing.assert_close(again[1], plain(plain(x, **weights), **weights)[0].detach())
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ff.ops.shared_ffn(y, **weights)
    torch.testing.assert_close(ff.ops.shared_ffn(y.clone(), **weights), again[0].clone())


def test_only_the_gradients_that_are_needed(shared_ffn_backend):
    weights = make(12, 20, True, True)
    x = torch.randn(5, 12)
    full = with_gradients(ff.ops.shared_ffn, [x], weights)
    names = ["x", *weights]
    for wanted in names:
        tensors = {"x": x, **weights}
        tensors[wanted] = tensors[wanted].clone().requires_grad_()
        y = ff.ops.shared_ffn(**tensors)
        (gradient,) = torch.autograd.grad(
            (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(7))).sum(), [tensors[wanted]]
        )
        assert torch.equal(gradient, full[1 + names.index(wanted)])


def test_two_layers_that_share_the_weights_add_their_gradients():
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(3)).double()
    gradients = []
    for function in (ff.ops.shared_ffn, plain):
        weights = {n: w.double().requires_grad_() for n, w in make(12, 20, False, True).items()}
        y = function(function(x, **weights) + x, **weights)
        y.square().sum().backward(retain_graph=True)
        once = [w.grad.clone() for w in weights.values()]
        y.square().sum().backward()  # a second backward through the same graph adds the same again
        for w, g in zip(weights.values(), once, strict=True):
            torch.testing.assert_close(w.grad, 2 * g)
        gradients.append(once)
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


def test_policies_keep_less_for_backward():
    weights = {name: w.requires_grad_() for name, w in make(12, 20, True, True).items()}
    kept = {}
    for policy in POLICIES:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            ff.ops.shared_ffn(torch.randn(100, 12), **weights, recompute=policy)
        kept[policy] = sum(sizes)
    hidden = 100 * 20  # one tensor of the hidden width
    assert kept["activation"] - kept["full"] == 2 * hidden and kept["none"] - kept["activation"] == hidden


def test_second_derivative_is_refused():
    x = torch.randn(4, 12, requires_grad=True)
    y = ff.ops.shared_ffn(x, **make(12, 20, False, False))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_autocast_computes_in_bfloat16_and_returns_float32_gradients(shared_ffn_backend):
    weights = {name: w.requires_grad_() for name, w in make(63, 100, True, True).items()}
    # More than the 512 tokens of one product, which a CPU with bfloat16 instructions rounds: the sum is not rounded.
    x = torch.randn(600, 63, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ff.ops.shared_ffn(x, **weights)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert all(w.grad.dtype == torch.float32 for w in weights.values())
    low = {name: w.detach().bfloat16() for name, w in weights.items()}
    assert torch.equal(y, ff.ops.shared_ffn(x.detach().bfloat16(), **low))
    rounded = weights["up"].grad.bfloat16().float()
    assert not torch.equal(weights["up"].grad, rounded)  # not rounded on the way


def test_autocast_leaves_float64_alone():
    weights = {name: w.double() for name, w in make(63, 100, True, True).items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert ff.ops.shared_ffn(torch.randn(5, 63).double(), **weights).dtype == torch.float64


def test_equal_inputs_give_equal_bits(shared_ffn_backend):
    weights, x = make(63, 100, True, True), [torch.randn(40, 63), torch.randn(7, 63)]
    first, second = (with_gradients(ff.ops.shared_ffn, x, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated, shared_ffn_backend):
    w = make(6, 8, gated, True)
    order = [w["up"], w.get("gate"), w["down"], w["up_bias"], w.get("gate_bias"), w["down_bias"]]
    xs = [torch.randn(5, 6), torch.randn(3, 6)]
    needs = [True, True, gated, True, True, gated, True]
    for policy in POLICIES:
        torch.library.opcheck(registered.forward_op, (xs, *order, "gelu", policy))
        ys, saved = registered.forward_op(xs, *order, "gelu", policy)
        torch.library.opcheck(registered.backward_op, (ys, xs, saved, *order, "gelu", policy, needs))


@pytest.mark.parametrize("recompute", POLICIES)
def test_compiles_whole_and_not_again_for_other_token_counts(recompute, shared_ffn_backend):
    weights = {name: w.requires_grad_() for name, w in make(12, 20, True, True).items()}
    call = lambda x: ff.ops.shared_ffn(x, **weights, activation="silu", recompute=recompute)  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)

    def gradients(function, tokens):
        x = torch.randn(2, tokens, 12, generator=torch.Generator().manual_seed(tokens), requires_grad=True)
        y = function(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *weights.values()])]

    gradients(compiled, 7)
    with no_recompile():
        for tokens in (31, 64):
            for ours, eager in zip(gradients(compiled, tokens), gradients(call, tokens), strict=True):
                torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "tanh"}, "activation: got 'tanh', want one of relu"),
        ({"recompute": "half"}, "recompute: got 'half', want one of none"),
        ({"x": torch.zeros(2, 5)}, r"x: got shape \[2, 5\], want \[..., 12\]"),
        ({"x": [torch.zeros(2, 12), torch.zeros(2, 5)]}, r"x\[1\]: got shape \[2, 5\], want \[..., 12\]"),
        ({"x": [torch.zeros(2, 12), torch.zeros(2, 12).double()]}, "torch.float64, want one floating-point dtype"),
        ({"x": [torch.zeros(2, 12), torch.zeros(2, 12, device="meta")]}, "move them to one device"),
        ({"x": torch.tensor(1.0)}, r"x: got shape \[\], want"),
        ({"x": torch.zeros(2, 12, dtype=torch.int64)}, "torch.int64, want one floating-point dtype"),
        ({"down_bias": torch.zeros(12).bfloat16()}, "torch.bfloat16, want one floating-point dtype"),
        ({"up_bias": torch.zeros(20, device="meta")}, "move them to one device"),
        ({"down": torch.zeros(12, 19)}, r"down: got shape \[12, 19\], want \[12, 20\]"),
        ({"gate": torch.zeros(12, 20)}, r"gate: got shape \[12, 20\], want \[20, 12\]"),
        ({"up_bias": torch.zeros(12)}, r"up_bias: got shape \[12\], want \[20\]"),
        ({"gate_bias": torch.zeros(20)}, "gate_bias: given without gate"),
        ({"up": torch.zeros(20)}, "want \\[d_ff, d\\]"),
        ({"x": torch.zeros(2, 12).double()}, "torch.float64, want one floating-point dtype"),
        ({"x": torch.zeros(2, 12, device="meta")}, "move them to one device"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"x": torch.zeros(2, 12), **make(12, 20, False, True), **change}
    with pytest.raises(ff.FFMergeError, match=message) as error:
        ff.ops.shared_ffn(**arguments)
    assert "\n" not in str(error.value)
