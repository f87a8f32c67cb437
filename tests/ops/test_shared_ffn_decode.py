"""Few tokens without gradients: kernels that read the weights where they lie."""

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.common import backends
from ffmerge_fast.ops.shared_ffn import cpp_backend
from ffmerge_fast.ops.shared_ffn.weights import FFNWeights
from ffmerge_fast.testing import assert_close_to_float64, nan_poisoned_empty
from tests.helpers.shared_ffn import ACTIVATIONS, make, plain

pytestmark = pytest.mark.usefixtures("shared_ffn_backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x, weights, activation="gelu", floor=None):
    with torch.no_grad(), nan_poisoned_empty():
        ours = ff.ops.shared_ffn(x, **weights, activation=activation)
    true = plain(x.double(), **{n: w.double() for n, w in weights.items()}, activation=activation)
    assert_close_to_float64(ours, plain(x, **weights, activation=activation), true, floor)


def transposed(weights):
    """As Conv1D keeps them: the same values, outputs contiguous."""
    return {n: w.T.contiguous().T if w.ndim == 2 else w for n, w in weights.items()}


@pytest.mark.parametrize("tokens", [*range(1, 17), 31, 63, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [dict, transposed])
def test_two_times_rule_at_every_number_of_tokens(tokens, dtype, layout):
    g = torch.Generator().manual_seed(tokens)
    for d, d_ff in ((63, 100), (96, 1200)):
        check(
            torch.randn(tokens, d, generator=g).to(dtype), layout(make(d, d_ff, tokens % 2 == 0, tokens % 3 > 0, dtype))
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_over_their_whole_range(activation, gated, dtype):
    x = torch.linspace(-30, 30, 1001).to(dtype)
    identity = {"up": torch.ones(1, 1, dtype=dtype), "down": torch.ones(1, 1, dtype=dtype)}
    check(x[:, None], identity | ({"gate": identity["up"]} if gated else {}), activation)
    for start in range(0, 1001, 13):
        part = x[start : start + 13, None]
        check(part, identity, activation, floor=torch.finfo(dtype).eps * part.abs().max().item())


def test_long_sums_stay_accurate():
    for layout in (dict, transposed):
        x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)) + 10
        check(x, layout(make(5000, 48, True, True)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_values_are_not_swallowed(value, activation):
    weights = make(16, 32, False, False)
    x = torch.ones(2, 16)
    x[1, 3] = value
    y = ff.ops.shared_ffn(x, **weights, activation=activation)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_views_and_overlapping_inputs():
    w = make(32, 64, True, True)
    fused = torch.cat([w["gate"], w["up"]])
    fused_bias = torch.cat([w["gate_bias"], w["up_bias"]])
    halves = {"gate": fused[:64], "up": fused[64:], "gate_bias": fused_bias[:64], "up_bias": fused_bias[64:]}
    base = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    for x in (base[:, ::2], base[:, 5:37], base[:3].T[:32].T, base[:1, :32].expand(5, 32), base[0, :32]):
        check(x, w | halves)
        check(x, {n: t.repeat_interleave(2, -1)[..., ::2] for n, t in w.items()})  # no dimension is contiguous
    same = make(32, 32, False, True)
    check(base[:4, :32], same | {"down": same["up"], "down_bias": same["up_bias"]})  # one tensor in two roles


def test_lists_of_few_tokens_are_stacked():
    weights = make(32, 64, True, True)
    xs = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 0, 5, 600, 3, 1)]
    with torch.no_grad():
        ys = ff.ops.shared_ffn(xs, **weights)
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(y, plain(x, **weights))
    ys[0].zero_()
    torch.testing.assert_close(ys[2], plain(xs[2], **weights))  # outputs share no memory


def replaced_by_set(w):
    w.set_(w.flip(0))  # not a constant: of equal rows the 2x rule compares one rounding (12-18 % of draws fail)


def swapped_data(w):
    w.data = w.flip(0)


@pytest.mark.parametrize(
    "change",
    [lambda w: w.mul_(2), lambda w: w.data.mul_(2), lambda w: w.data.neg_(), swapped_data, replaced_by_set],
    ids=["in place", "in place through data", "same version", "data swapped", "storage swapped"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_change_of_a_weight_is_seen(change, mode):
    weights = make(32, 64, True, True)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    with mode():
        ff.ops.shared_ffn(x, **weights)
        for name in weights:
            before = ff.ops.shared_ffn(x, **weights)
            change(weights[name])
            after = ff.ops.shared_ffn(x, **weights)
            assert not torch.equal(before, after)
            check(x, {n: w.clone() for n, w in weights.items()})
            assert torch.equal(after, ff.ops.shared_ffn(x, **{n: w.clone() for n, w in weights.items()}))


def test_module_sees_optimizer_steps_loaded_weights_and_other_dtypes():
    torch.manual_seed(0)
    module = ff.nn.SharedFFN(32, 64, activation="silu", gated=True)
    x = torch.randn(2, 32)

    def agrees():
        linears = {n: getattr(module, n) for n in ("up", "gate", "down")}
        weights = {n: linear.weight for n, linear in linears.items()}
        weights |= {f"{n}_bias": linear.bias for n, linear in linears.items()}
        with torch.inference_mode():
            check(x.to(module.up.weight.dtype), {n: w.clone() for n, w in weights.items()}, "silu")
            ours = module(x.to(module.up.weight.dtype))
            return torch.equal(ours, ff.ops.shared_ffn(x.to(ours.dtype), **weights, activation="silu")) and ours

    first = agrees()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(x).square().sum().backward()
    optimizer.step()
    second = agrees()
    module.load_state_dict({n: t * 0.5 for n, t in module.state_dict().items()})
    third = agrees()
    assert not torch.equal(first, second) and not torch.equal(second, third)
    module.to(torch.bfloat16)
    assert agrees().dtype == torch.bfloat16
    module.load_state_dict({n: t * 2 for n, t in module.state_dict().items()}, assign=True)
    assert not torch.equal(agrees().float(), third)


def test_threads_change_no_bit():
    weights = [layout(make(96, 1200, True, True)) for layout in (dict, transposed)]
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                results.append([ff.ops.shared_ffn(x, **w) for w in weights])
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(results[0], other, strict=True))


def test_few_tokens_reach_the_kernel_and_many_do_not(monkeypatch, shared_ffn_backend):
    if shared_ffn_backend == "reference":
        pytest.skip("the reference has no kernel")
    calls = []
    decode = cpp_backend._decode
    monkeypatch.setattr(cpp_backend, "_decode", lambda x, *rest: calls.append(len(x)) or decode(x, *rest))
    weights = make(32, 64, False, False)
    most = cpp_backend.most_decoded_tokens(torch.float32)
    with torch.inference_mode():
        for tokens in (1, most, most + 1):
            ff.ops.shared_ffn(torch.zeros(tokens, 32), **weights)
    ff.ops.shared_ffn(torch.zeros(1, 32), **{n: w.clone().requires_grad_() for n, w in weights.items()})
    assert calls == [1, most]


def test_float64_is_left_to_the_reference(shared_ffn_backend):
    if shared_ffn_backend != "reference":
        with pytest.raises(ff.FFMergeError, match="the tensors are torch.float64"):
            ff.ops.shared_ffn(torch.zeros(1, 4).double(), torch.zeros(8, 4).double(), torch.zeros(4, 8).double())
    with pytest.MonkeyPatch.context() as patch:  # undone before the backend's own
        patch.delenv("FFMERGE_BACKEND")
        assert backends.select("shared_ffn", torch.zeros(1).double()).__name__.endswith("reference")


def test_matrix_units_take_up_to_sixteen_tokens_in_bfloat16(shared_ffn_backend):
    if shared_ffn_backend == "reference":
        pytest.skip("torch rounds the hidden features")
    rounds = "amx" in shared_ffn_backend  # a matrix unit rounds them too, our other kernels do not
    up, down = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, -1.0]])
    for dtype, tokens, expected in (
        (torch.bfloat16, 16, 0 if rounds else 2**-10),
        (torch.bfloat16, 17, 2**-10),
        (torch.float32, 16, 2**-10),
    ):
        x = torch.tensor([[1.0, 2**-10]]).expand(tokens, 2).to(dtype)  # hidden: 1 + 2^-10 and 1
        y = cpp_backend._decode(x, FFNWeights(up.to(dtype), None, down.to(dtype), None, None, None), "relu")
        assert (y == expected).all()
