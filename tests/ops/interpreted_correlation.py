"""The Triton kernels of the correlation op in Triton's interpreter, on the CPU; test_correlation_triton.py starts it.

TRITON_INTERPRET=1 has to be set before triton is imported, hence a process of its own.
"""

import os

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.common.activations import FORWARD
from ffmerge_fast.ops.correlation import reference, registered, triton_backend
from ffmerge_fast.testing import nan_poisoned_empty

assert os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("FFMERGE_BACKEND") == "triton"


def features(tokens, width, seed, mean=0.0, dtype=torch.float32):
    common = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    x = common @ torch.randn(5, width, generator=g) / 5**0.5 + 0.5 * torch.randn(tokens, width, generator=g)
    return (x + mean * torch.randn(width, generator=g).sign()).to(dtype)


def accumulate(x, pairs, splits=(), mask=None, **options):
    state = ff.CorrelationState({key: value.shape[-1] for key, value in x.items()}, pairs, **options)
    bounds = [0, *splits, len(next(iter(x.values())))]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        part = None if mask is None else mask[start:stop]
        ff.ops.correlation_accumulate_(state, {key: value[start:stop] for key, value in x.items()}, part)
    return state


def halves(state, key, x, mask=None):
    """What a layer is packed to, by plain PyTorch: value, high and low halves in float64."""
    value = x.float() if state.activation is None else FORWARD[state.activation](x.float())
    value = value - state._moments.layers[key].pivot
    if mask is not None:
        value = value.masked_fill(~mask[:, None], 0)
    high = value.bfloat16().float()
    return value.double(), high.double(), (value - high).bfloat16().double()


def check_against_plain(state, x, mask=None):
    """The sums exactly, the products but for float32 additions."""
    packed = {key: halves(state, key, value, mask) for key, value in x.items()}
    for key, (value, high, _) in packed.items():
        summed = high if state.compute == "bf16" else value
        layer = state._moments.layers[key]
        assert layer.tokens == (len(value) if mask is None else int(mask.sum()))
        torch.testing.assert_close(layer.sum, summed.sum(0), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(layer.sumsq, summed.square().sum(0), rtol=1e-12, atol=1e-9)
    for a, b in state.pairs:
        (_, high_a, low_a), (_, high_b, low_b) = packed[a], packed[b]
        expected = high_a.T @ high_b
        if state.compute != "bf16":
            expected += high_a.T @ low_b + low_a.T @ high_b
        tolerance = 1e-6 * (high_a.abs().T @ high_b.abs()).max().item()
        products = state._moments.accumulators.product((a, b))
        torch.testing.assert_close(products.double(), expected, rtol=0, atol=tolerance)


def truth(a, b, mask=None):
    a, b = (x.double() if mask is None else x.double()[mask] for x in (a, b))
    return torch.corrcoef(torch.cat([a, b], 1).T)[: a.shape[1], a.shape[1] :]


@pytest.mark.parametrize("tokens, width_a, width_b", [(2, 1, 1), (63, 63, 100), (100, 1, 63), (130, 100, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_plain_rounding(tokens, width_a, width_b, dtype):
    x = {0: features(tokens, width_a, 1, 30.0, dtype), 1: features(tokens, width_b, 2, 0.0, dtype)}
    for compute in ("bf16", "bf16x3"):
        with nan_poisoned_empty():
            check_against_plain(accumulate(x, [(0, 1)], compute=compute), x)


@pytest.mark.parametrize("compute", ["bf16", "bf16x3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_high_halves_may_go_to_cublas(compute, dtype, monkeypatch):
    calls = []

    def addmm(products, a, b):
        calls.append(b.shape)
        products.add_(a.float() @ b.float())

    monkeypatch.setattr(triton_backend, "_addmm_adds_to_float32", lambda accumulator: True)
    monkeypatch.setattr(triton_backend, "_addmm_to_float32_", addmm)
    monkeypatch.setattr(triton_backend, "_PIECE", 100)
    x = {i: features(130, width, i, 0.5 * i, dtype) for i, width in enumerate((100, 64, 40))}
    with nan_poisoned_empty():
        check_against_plain(accumulate(x, [(0, 1), (0, 2), (1, 1)], compute=compute), x)
    pieces = [100, 30] if compute == "bf16x3" else [130]
    assert calls == [(tokens, width) for width in (64, 40) for tokens in pieces]


@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_float32_grade(mean, dtype):
    x = {0: features(1500, 40, 1, mean, dtype), 1: features(1500, 33, 2, mean, dtype)}
    state = accumulate(x, [(0, 1)], splits=(700,))
    assert isinstance(state._moments.accumulators.packing, triton_backend.TensorCorePacking)
    assert (state.correlation(0, 1) - truth(x[0], x[1])).abs().max() <= 1e-6


def test_bfloat16_inputs_around_zero_need_no_low_halves():
    for mean in (0.0, 1.5):
        x = {0: features(200, 40, 1, mean, torch.bfloat16), 1: features(200, 40, 2, mean, torch.bfloat16)}
        state = ff.CorrelationState({0: 40, 1: 40}, [(0, 1)])
        for key, value in x.items():
            state.push(key, value)
        flags = state._moments.accumulators._waiting[0].blocks[0][0, :40]
        assert flags.any() == (mean > 0)
        state.end_batch()
        check_against_plain(state, x)


@pytest.mark.parametrize("activation", list(FORWARD))
@pytest.mark.parametrize("compute, tolerance", [("bf16", 5e-3), ("bf16x3", 1e-5), ("fp32", 1e-6)])
def test_activations_equal_the_reference(activation, compute, tolerance):
    x = {0: features(90, 20, 1), 1: features(90, 33, 2)}
    ours = accumulate(x, [(0, 1)], activation=activation, compute=compute)
    with ff.use_backend("reference"):
        theirs = accumulate(x, [(0, 1)], activation=activation, compute=compute)
    torch.testing.assert_close(ours.correlation(0, 1), theirs.correlation(0, 1), rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=max(tolerance, 1e-6))


@pytest.mark.parametrize("compute", ["bf16", "auto", "fp32"])
def test_masked_tokens_do_not_count(compute):
    x = {0: features(90, 20, 1, 50.0), 1: features(90, 30, 2, 50.0)}
    mask = torch.rand(90, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[:20] = False  # a first batch without tokens must not set the pivot
    kept = accumulate({key: value[mask] for key, value in x.items()}, [(0, 1)], compute=compute).correlation(0, 1)
    for value in x.values():
        value[~mask] = torch.nan
    with nan_poisoned_empty():
        state = accumulate(x, [(0, 1)], (20, 47), mask, compute=compute)
    assert state.count(0) == state.count(1) == int(mask.sum())
    torch.testing.assert_close(state.correlation(0, 1), kept, rtol=0, atol=1e-2 if compute == "bf16" else 1e-5)


def test_more_pairs_than_one_launch_takes():
    widths = {0: 40, 1: 70, 2: 33, 3: 64, 4: 20}
    x = {key: features(50, width, key, 5.0) for key, width in widths.items()}
    pairs = [(a, b) for a in widths for b in widths if a <= b]
    assert len(pairs) > 8
    check_against_plain(accumulate(x, pairs), x)


@pytest.mark.parametrize("compute", ["bf16", "bf16x3"])
def test_self_pair_is_symmetric_and_survives_merge_and_reload(compute):
    x = {0: features(300, 100, 1, 10.0), 1: features(300, 33, 2)}
    pairs = [(0, 0), (0, 1), (1, 1)]
    state = accumulate(x, pairs, compute=compute)
    check_against_plain(state, x)
    products = state._moments.accumulators.product((0, 0))
    assert torch.equal(products, products.T)
    assert (state.correlation(0, 0).diagonal() - 1).abs().max() <= 1e-5
    again = accumulate({key: value[:0] for key, value in x.items()}, pairs, compute=compute)
    again.load_state_dict_(state.state_dict())
    assert all(torch.equal(again.correlation(*pair), state.correlation(*pair)) for pair in pairs)
    split = [accumulate({k: v[part] for k, v in x.items()}, pairs) for part in (slice(0, 120), slice(120, 300))]
    merged = split[0].merge_(split[1])
    for a, b in pairs:
        assert (merged.correlation(a, b) - truth(x[a], x[b])).abs().max() <= 1e-5


def test_upper_half_leaves_tiles_out():
    full, upper = (triton_backend._tiles(3072, 3072, self_pair, 128, 256) for self_pair in (False, True))
    assert len(full) == 288 and len(upper) == 156
    rows, columns = upper >> 16, upper & 0xFFFF
    assert ((columns + 1) * 256 > rows * 128).all() and len(upper.unique()) == 156
    assert set(upper.tolist()) <= set(full.tolist())


@pytest.mark.parametrize("gathered", [1, 100, 10_000])
def test_small_batches_are_gathered(gathered, monkeypatch):
    monkeypatch.setattr(triton_backend.TensorCorePacking, "tokens_per_product", gathered)
    x = {0: features(300, 40, 1, 4.0), 1: features(300, 33, 2, 4.0)}
    with nan_poisoned_empty():
        state = accumulate(x, [(0, 1)], splits=(80, 81, 81, 150))  # the first batch settles the pivot
        check_against_plain(state, x)


def test_separate_stacks_may_see_different_numbers_of_tokens():
    x = {"e0": features(70, 20, 1), "e1": features(70, 20, 2), "d0": features(33, 20, 3), "d1": features(33, 20, 4)}
    state = ff.CorrelationState(dict.fromkeys(x, 20), [("e0", "e1"), ("d0", "d1")])
    for key, value in x.items():
        state.push(key, value)
    state.end_batch()
    check_against_plain(state, x)


def test_more_tokens_than_tensor_cores_sum_at_a_time():
    x = {0: features(1100, 20, 1), 1: features(1100, 20, 2)}
    state = accumulate(x, [(0, 1)], compute="bf16")
    assert triton_backend.closed_form(64 * 1024)["STEPS"] * 64 < 1100
    check_against_plain(state, x)


def test_non_contiguous_float64_and_zero_tokens():
    x = {0: features(63, 80, 1).double()[:, ::2], 1: features(40, 63, 2).T}
    state = accumulate(x, [(0, 1)])
    check_against_plain(state, x)
    before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    ff.ops.correlation_accumulate_(state, {0: torch.empty(0, 40), 1: torch.empty(0, 40)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.state_dict().items())


def test_equal_features_give_equal_bits():
    x = {0: features(100, 63, 1), 1: features(100, 63, 2)}
    assert torch.equal(*(accumulate(x, [(0, 1)], splits=(40,)).correlation(0, 1) for _ in range(2)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("compute", ["bf16", "auto", "fp32"])
def test_non_finite_features_name_their_layer(value, compute):
    x = {0: features(10, 4, 1), 1: features(10, 6, 2)}
    x[1][3, 2] = value
    with pytest.raises(ff.FFMergeError, match=r"layers \[1\] hold NaN, Inf"):
        accumulate(x, [(0, 1)], compute=compute, activation="relu" if value == torch.inf else None)


@pytest.mark.parametrize("compute, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)])
def test_single_ops_equal_the_reference(compute, dtype):
    x, mask = features(70, 33, 1, 9.0), torch.arange(70) % 3 > 0
    results = []
    for backend in (triton_backend, reference):
        kind = torch.float64 if compute == "fp64" else torch.float32
        sums = [torch.zeros(33, dtype=t) for t in (kind, torch.float64, torch.float64)]
        count, products = torch.zeros((), dtype=torch.int64), torch.zeros(33, 33, dtype=kind)
        rows = backend.accumulate_layer_(x, mask, count, *sums, None, compute, True)
        backend.accumulate_pair_(rows, rows, products)
        assert rows.dtype == dtype and rows.is_contiguous()
        results.append([rows, count, *sums, products])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


def test_opcheck():
    sums = [torch.zeros(6, dtype=t) for t in (torch.float32, torch.float64, torch.float64)]
    count = torch.zeros((), dtype=torch.int64)
    for compute in ("bf16", "fp32"):
        arguments = (features(20, 6, 1), torch.rand(20) < 0.5, count, *sums, "gelu", compute, True)
        torch.library.opcheck(registered.accumulate_layer_, arguments)


@pytest.mark.parametrize("rows", [64, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "dtype, activation", [(torch.float32, None), (torch.bfloat16, "gelu"), (torch.float16, "relu")]
)
def test_rings_match_the_reference_in_any_batches(rows, masked, dtype, activation):
    x = {0: features(600, 130, 1, 5.0, dtype), 1: features(600, 7, 2, 0.0, dtype)}
    mask = torch.rand(600, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    with nan_poisoned_empty():
        state = accumulate(x, [(0, 1)], mask=mask, sketch=rows, activation=activation)
        parts = accumulate(x, [(0, 1)], (1, 300, 557), mask, sketch=rows, activation=activation)
    found, again = state.state_dict(), parts.state_dict()
    assert all(torch.equal(found[name], again[name]) for name in found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "accumulate_ring_", reference.accumulate_ring_)
        expected = accumulate(x, [(0, 1)], mask=mask, sketch=rows, activation=activation).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=2e-5)
