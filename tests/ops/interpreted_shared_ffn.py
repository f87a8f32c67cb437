"""The Triton kernels of the shared FFN in Triton's interpreter; test_shared_ffn_triton.py starts it."""

import os

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.shared_ffn import triton_backend as backend
from ffmerge_fast.ops.shared_ffn.weights import FFNWeights
from ffmerge_fast.testing import assert_close_to_float64, nan_poisoned_empty
from tests.helpers.shared_ffn import ACTIVATIONS, POLICIES, make, plain, plain_list, with_gradients
from tests.ops.test_shared_ffn import (  # the whole op on this backend  # noqa: F401
    test_autocast_computes_in_bfloat16_and_returns_float32_gradients,
    test_compiles_whole_and_not_again_for_other_token_counts,
    test_equal_inputs_give_equal_bits,
    test_input_shapes_agree,
    test_only_the_gradients_that_are_needed,
    test_opcheck,
    test_two_times_rule_on_values_and_gradients,
    test_weight_gradients_of_many_bfloat16_inputs_are_summed_in_float32,
    test_zero_tokens,
)
from tests.ops.test_shared_ffn_decode import check, transposed
from tests.ops.test_shared_ffn_gradients import (  # noqa: F401
    test_autograd_grad_returns_gradients_and_fills_nothing,
    test_main_grad_is_the_sum_in_float32,
    test_tied_training_equals_autograd,
)

assert os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("FFMERGE_BACKEND") == "triton"
HALF = [torch.bfloat16, torch.float16]
KINDS = [(gated, bias) for gated in (False, True) for bias in (False, True)]


@pytest.fixture
def shared_ffn_backend():
    return "triton"


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched."""
    names, run = [], backend.launch
    monkeypatch.setattr(
        backend, "launch", lambda kernel, *rest, **options: names.append(kernel) or run(kernel, *rest, **options)
    )
    return lambda: [kernel.__name__.removeprefix("_shared_ffn_").removesuffix("_kernel") for kernel in names]


def random(tokens, width, dtype, seed=1):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mixed(weights):
    """up as Conv1D keeps it, the others as nn.Linear does."""
    return weights | {"up": weights["up"].T.contiguous().T}


def gaps(weights):
    """No dimension of a matrix is contiguous."""
    return {n: w.repeat_interleave(2, -1)[..., ::2] for n, w in weights.items()}


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("gated, bias", KINDS)
@pytest.mark.parametrize("layout, dtype", [(dict, HALF[0]), (transposed, HALF[0]), (dict, HALF[1]), (gaps, HALF[1])])
def test_few_tokens_in_one_launch(tokens, gated, bias, dtype, layout, launches):
    for d, d_ff in ((63, 100), (264, 72)):
        check(random(tokens, d, dtype), layout(make(d, d_ff, gated, bias, dtype)), "silu")
    assert launches() == ["decode"] * 2


def test_long_sums_of_few_tokens():
    for layout in (dict, transposed):
        check(random(3, 1500, torch.bfloat16) + 4, layout(make(1500, 48, True, True, torch.bfloat16)))
        check(random(3, 24, torch.bfloat16) + 4, layout(make(24, 1500, False, True, torch.bfloat16)))


@pytest.mark.parametrize("processors", [1, 3, 100])
def test_readers_and_counters(processors, monkeypatch):
    zeros = torch.zeros(4, dtype=torch.int32)
    monkeypatch.setattr(backend, "counters", lambda device: zeros)
    monkeypatch.setattr(backend, "multiprocessors", lambda device: processors)
    for seed in range(2):  # the second launch finds the counters as the first one left them
        check(random(4, 100, torch.bfloat16, seed), make(100, 70, False, True, torch.bfloat16))
        assert not zeros.any()


@pytest.mark.parametrize("tokens", [17, 600])
@pytest.mark.parametrize("gated, bias", KINDS)
@pytest.mark.parametrize("layout", [dict, transposed, mixed, gaps])
@pytest.mark.parametrize("d, d_ff", [(72, 136), (63, 100)])  # what TMA can read, and what it cannot
def test_many_tokens(tokens, gated, bias, layout, d, d_ff, launches):
    weights = layout(make(d, d_ff, gated, bias, torch.bfloat16))
    check(random(tokens, d, torch.bfloat16), weights, "silu")
    assert launches() == ["hidden"]


def test_how_weights_are_read():
    x, weights = random(20, 72, torch.bfloat16), make(72, 136, True, False, torch.bfloat16)
    found = {}
    for layout in (dict, transposed, mixed, gaps):
        w = layout(weights)
        found[layout.__name__] = backend._tma(x, w["up"], w["gate"])
    assert found == {"dict": "rows", "transposed": "columns", "mixed": "", "gaps": ""}
    up = weights["up"]
    assert backend._tma(x[:, 1:], up[:, 1:], None) == "" == backend._tma(x[:0], up, None)
    assert backend._tma(x[:1].expand(20, 72), up, None) == ""


@pytest.mark.parametrize("tokens", [3, 40])
def test_inputs_of_any_strides(tokens):
    weights = make(24, 40, True, True, torch.bfloat16)
    base = random(48, 48, torch.bfloat16)
    for x in (base[:tokens, ::2], base[:tokens, 5:29], base[:24, :tokens].T, base[:1, :24].expand(tokens, 24)):
        check(x, weights)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_activations_and_derivatives_over_their_whole_range(activation, gated, dtype, monkeypatch):
    one = {"up": torch.ones(1, 1, dtype=dtype), "down": torch.ones(1, 1, dtype=dtype)}
    one |= {"gate": one["up"]} if gated else {}
    x = torch.linspace(-12, 12, 401).to(dtype)[:, None]
    for width in (backend._WIDEST, 0):  # in the epilogue; after a GEMM of torch
        monkeypatch.setattr(backend, "_WIDEST", width)
        check(x, one, activation)
        results = [
            with_gradients(function, [x], one, kind, activation=activation)
            for function, kind in ((ff.ops.shared_ffn, None), (plain_list, None), (plain_list, torch.float64))
        ]
        for ours, same, true in zip(*results, strict=True):
            assert_close_to_float64(ours, same, true)
    for start in range(0, 401, 80):
        part = x[start : start + 16]
        check(part, one, activation, floor=torch.finfo(dtype).eps * part.abs().max().item() ** 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_values_are_not_swallowed(value, tokens, activation):
    x = torch.ones(tokens, 16, dtype=torch.bfloat16)
    x[1, 3] = value
    y = ff.ops.shared_ffn(x, **make(16, 32, False, False, torch.bfloat16), activation=activation)
    assert y[0].isfinite().all() and y[2:].isfinite().all() and not y[1].isfinite().any()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_in_pieces_and_stacks(policy, gated, dtype, monkeypatch):
    monkeypatch.setattr(backend, "_PIECE", 100)
    weights = transposed(make(40, 72, gated, True, dtype))
    xs = [random(tokens, 40, dtype, tokens) for tokens in (30, 0, 16, 530, 70)]
    with nan_poisoned_empty():
        ours, again = (with_gradients(ff.ops.shared_ffn, xs, weights, recompute=policy) for _ in range(2))
    same, true = (with_gradients(plain_list, xs, weights, kind) for kind in (dtype, torch.float64))
    for kernel, repeated, torch_same, float64 in zip(ours, again, same, true, strict=True):
        assert torch.equal(kernel, repeated)
        assert_close_to_float64(kernel, torch_same, float64)


def test_what_was_kept_stays_as_it_is():
    weights = FFNWeights(**make(24, 40, True, True, torch.bfloat16))
    xs, needs = [random(70, 24, torch.bfloat16)], [True] * 7
    for policy in ("none", "activation"):
        ys, saved = backend.forward(xs, weights, "gelu", policy)
        before = [kept.clone() for kept in saved]
        first, second = (backend.backward(ys, xs, saved, weights, "gelu", policy, needs) for _ in range(2))
        assert all(map(torch.equal, saved, before))
        assert all(torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True))


def test_which_kernel_runs(launches, monkeypatch):
    weights = make(32, 64, False, False, torch.bfloat16)

    def run(tokens, width=32, **options):
        before = len(launches())
        with torch.no_grad():
            ff.ops.shared_ffn(random(tokens, width, torch.bfloat16), **{**weights, **options})
        return launches()[before:]

    assert run(1) == run(16) == ["decode"] and run(17) == ["hidden"] and run(0) == []
    monkeypatch.setattr(backend, "_DECODED_BYTES", 2 * 2 * 32 * 64 - 1)
    assert run(1) == ["hidden"]
    monkeypatch.setattr(backend, "_WIDEST", 31)
    assert run(1) == ["activate"]
    x = random(4, 32, torch.bfloat16).requires_grad_()
    monkeypatch.setattr(backend, "_WIDEST", 32)
    before = len(launches())
    for policy, kernel in (("activation", "activate"), ("full", "hidden")):  # what is kept must be written anyway
        y = ff.ops.shared_ffn(x, **weights, recompute=policy)
        torch.autograd.grad(y.sum(), x)
        assert launches()[before:] == [kernel, "activate"]
        before = len(launches())


def test_float32_and_float64_are_multiplied_by_torch(launches):
    for dtype, kernels in ((torch.float32, ["activate"]), (torch.float64, [])):
        weights = make(24, 40, True, True, dtype)
        x = random(5, 24, dtype)
        before = len(launches())
        with torch.no_grad():
            y = ff.ops.shared_ffn(x, **weights)
        torch.testing.assert_close(y, plain(x, **weights))
        assert launches()[before:] == kernels


def test_lists_of_few_tokens_are_one_launch(launches):
    weights = make(32, 64, True, True, torch.bfloat16)
    xs = [random(tokens, 32, torch.bfloat16, tokens) for tokens in (1, 0, 5, 600, 3, 1)]
    with torch.no_grad():
        ys = ff.ops.shared_ffn(xs, **weights)
        assert launches() == ["decode", "hidden", "decode"]
        again = [ff.ops.shared_ffn(x, **weights) for x in xs]
    assert all(map(torch.equal, ys, again))
    ys[0].zero_()
    assert torch.equal(ys[2], again[2])  # outputs share no memory
