"""Sketched correlations on every backend: what a ring holds, estimates and their error, batches, merging, saving."""

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.ops.correlation import registered
from ffmerge_fast.ops.correlation.ring import signs
from tests.helpers.correlation import correlate, features, state_of, truth

pytestmark = pytest.mark.usefixtures("correlation_backend")
TOKENS, ROWS = 3000, 128
CPU = torch.device("cpu")


def two_layers(tokens=TOKENS, dtype=torch.float32, widths=(40, 57)):
    return {key: features(tokens, width, key + 1, 3.0).to(dtype) for key, width in enumerate(widths)}


def exact_ring(x, rows, mean):
    """The definition, in float64: token t times its sign goes to row t mod m."""
    ring = torch.zeros(rows, x.shape[1], dtype=torch.float64)
    signed = (x.double() - mean) * signs(0, len(x), CPU).double()[:, None]
    return ring.index_add_(0, torch.arange(len(x)) % rows, signed)


def estimate(a, b, rows):
    a, b = a.double(), b.double()
    rings = [exact_ring(x, rows, x.mean(0)) / x.std(0, correction=0) for x in (a, b)]
    return rings[0].T @ rings[1] / len(a)


def same_bits(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_signs_are_those_of_splitmix64():
    mask = 2**64 - 1
    found = []
    for position in range(1000):
        x = position * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        found.append(1 - 2 * (x >> 31 & 1))
    assert signs(0, 1000, CPU).tolist() == found
    assert torch.equal(signs(300, 500, CPU), signs(0, 1000, CPU)[300:800])
    assert abs(sum(found)) < 4 * 1000**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [100, 1024])
def test_the_estimate_is_that_of_the_definition(dtype, rows):
    x = two_layers(dtype=dtype)
    state = correlate(x, splits=(700, 701, 2100), sketch=rows)
    expected = estimate(x[0].float(), x[1].float(), rows).clamp(-1, 1)
    assert (state.correlation(0, 1) - expected).abs().max() <= 2e-5
    assert torch.equal(state.correlation(1, 0), state.correlation(0, 1).T)
    for key, value in x.items():
        mean, variance = value.double().mean(0), value.double().var(0, correction=0)
        torch.testing.assert_close(state.mean(key), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state.variance(key), variance, rtol=1e-6, atol=0)
    scale = state.variance(0).sqrt()[:, None] * state.variance(1).sqrt()
    torch.testing.assert_close(state.covariance(0, 1).double(), expected * scale, rtol=0, atol=2e-4)


def test_any_pair_is_had_with_the_error_that_is_said():
    x = {key: features(8192, 60, key, mixed=4) + torch.randn(8192, 60) for key in range(3)}
    state = state_of(x, pairs=[(0, 1), (1, 2)], sketch=256)
    ff.ops.correlation_accumulate_(state, x)
    assert state.sketch_error == 1 / 16
    for a, b in ((0, 1), (0, 2), (2, 1)):
        error = state.correlation(a, b).double() - truth(x[a], x[b])
        assert abs(error.mean()) < 0.3 * state.sketch_error
        assert 0.7 < error.std() / state.sketch_error < 1.4


def test_a_token_for_each_row_is_exact():
    x = two_layers(500)
    assert (correlate(x, sketch=512).correlation(0, 1) - truth(x[0], x[1])).abs().max() <= 2e-6


@pytest.mark.parametrize("rows", [100, 256])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_do_not_change_a_bit(rows, activation, dtype):
    x = two_layers(dtype=dtype)
    whole = correlate(x, sketch=rows, activation=activation)
    for splits in ((1,), (255, 256, 257, 1111), tuple(range(90, TOKENS, 90))):
        assert same_bits(correlate(x, splits, sketch=rows, activation=activation), whole)


def test_masked_tokens_leave_no_trace():
    x = two_layers()
    mask = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)) < 0.6
    kept = correlate({key: value[mask] for key, value in x.items()}, sketch=ROWS)
    for value in x.values():
        value[~mask] = torch.nan
    state = correlate(x, (500, 1700), mask, sketch=ROWS)
    assert state.count(0) == int(mask.sum()) and same_bits(state, kept)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "relu2", "quick_gelu"])
def test_activations(activation):
    from ffmerge_fast.ops.common.activations import FORWARD

    x = {key: value / 3 for key, value in two_layers().items()}
    fused = correlate(x, sketch=ROWS, activation=activation)
    before = {key: FORWARD[activation](value) for key, value in x.items()}
    assert (fused.correlation(0, 1) - correlate(before, sketch=ROWS).correlation(0, 1)).abs().max() <= 1e-4


def test_large_means_and_dead_neurons():
    x = two_layers(4000)
    x[0][:, 3], x[1][:, 5] = 7.25, 0.0
    expected = estimate(x[0] + torch.randn(4000, 40) * 1e-9, x[1] + torch.randn(4000, 57) * 1e-9, ROWS)
    expected[3], expected[:, 5] = 0, 0
    state = correlate({key: value + 1000 for key, value in x.items()}, sketch=ROWS)
    assert (state.correlation(0, 1) - expected.clamp(-1, 1)).abs().max() <= 2e-3  # inputs are rounded to 6e-5 already
    assert not state.correlation(0, 1)[3].any() and not state.correlation(0, 1)[:, 5].any()
    assert torch.equal(state.correlation(0, 0).diagonal(), (torch.arange(40) != 3).float())


def test_merged_states_hold_both_tokens():
    x = two_layers(4000)
    parts = [correlate({key: v[rows] for key, v in x.items()}, sketch=256) for rows in (slice(1500), slice(1500, None))]
    before = parts[1].correlation(0, 1)
    merged = parts[0].merge_(parts[1])
    assert torch.equal(parts[1].correlation(0, 1), before)
    assert merged.count(0) == 4000
    torch.testing.assert_close(merged.mean(0), x[0].double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.variance(1), x[1].double().var(0, correction=0), rtol=1e-6, atol=0)
    error = merged.correlation(0, 1) - truth(x[0], x[1])
    assert 0.5 < error.std() / merged.sketch_error < 1.5


def test_the_same_tokens_twice_are_no_error():
    """Two rings with the same signs would add to one of twice the size: cross terms must cancel instead."""
    x = two_layers(512)
    once = correlate(x, sketch=512)
    exact = once.correlation(0, 1)
    twice = once.merge_(correlate(x, sketch=512))
    assert (twice.correlation(0, 1) - exact).std() < 1.5 * twice.sketch_error
    assert (twice.correlation(0, 1) - exact).abs().max() > 1e-4


@pytest.mark.parametrize("at", [256, 700, 1])
def test_saving_on_the_way_changes_nothing(at):
    x = two_layers()
    whole = correlate(x, (at,), sketch=ROWS)
    first = correlate({key: value[:at] for key, value in x.items()}, sketch=ROWS)
    assert not first.waits()
    second = state_of(x, sketch=ROWS).load_state_dict_({k: v.clone() for k, v in first.state_dict().items()})
    assert second.count(0) == at
    ff.ops.correlation_accumulate_(second, {key: value[at:] for key, value in x.items()})
    assert same_bits(second, whole)


def test_half_a_sketch():
    x = two_layers(8192)
    state = correlate(x, sketch=512)
    half, truly = state.half_correlation(0, 1), truth(x[0], x[1])
    assert torch.equal(state.half_correlation(1, 0), half.T)
    other = 2 * state.correlation(0, 1) - half  # of the other rows
    first, second = half - truly, other - truly
    assert 0.7 < first.std() * 16 < 1.4
    assert abs((first * second).mean()) < 0.2 * first.square().mean()


def test_wrong_arguments():
    for rows in (0, 15, -1, 16.0, "many", True):
        with pytest.raises(ff.FFMergeError, match="sketch: got"):
            ff.CorrelationState({0: 8}, [], sketch=rows)
    with pytest.raises(ff.FFMergeError, match="compute: got 'fp64'"):
        ff.CorrelationState({0: 8}, [], sketch=16, compute="fp64")
    with pytest.raises(ff.FFMergeError, match="sketch=31"):
        ff.CorrelationState({0: 8, 1: 8}, [], sketch=64, max_memory=2000)
    exact, sketched = ff.CorrelationState({0: 8}, [(0, 0)]), ff.CorrelationState({0: 8}, [(0, 0)], sketch=16)
    with pytest.raises(ff.FFMergeError, match="differ in sketch: None and 16"):
        exact.merge_(sketched)
    with pytest.raises(ff.FFMergeError, match="exact"):
        exact.half_correlation(0, 0)
    with pytest.raises(ff.FFMergeError, match="state_dict"):
        sketched.load_state_dict_(exact.state_dict())
    other = ff.CorrelationState({0: 8}, [(0, 0)], sketch=17)
    with pytest.raises(ff.FFMergeError, match="ring/0/rows is .* want .*of another sketch"):
        sketched.load_state_dict_(other.state_dict())
    with pytest.raises(ff.FFMergeError, match="no tokens"):
        sketched.correlation(0, 0)


@pytest.mark.parametrize("tokens", [100, 300])
def test_bad_features_name_their_layers(tokens):
    x = two_layers(tokens)
    x[1][tokens - 1, 3] = torch.nan
    with pytest.raises(ff.FFMergeError, match=r"layers \[1\] hold NaN"):
        correlate(x, sketch=ROWS)


def test_layers_of_other_token_counts_are_no_pair():
    state = ff.CorrelationState({0: 4, 1: 4, 2: 4}, [(0, 1)], sketch=16)
    for key, tokens in ((0, 50), (1, 50), (2, 60)):
        state.push(key, torch.randn(tokens, 4))
    state.end_batch()
    assert state.correlation(0, 1).shape == (4, 4)
    with pytest.raises(ff.FFMergeError, match="saw 50 and 60 tokens"):
        state.correlation(0, 2)


@pytest.mark.parametrize("chosen", [False, True])
def test_opcheck(chosen):
    x, at = features(60, 6, 1), torch.arange(60)[::2].contiguous() if chosen else None
    sign = signs(0, 30 if chosen else 60, CPU)
    sums = torch.zeros(2, 6, dtype=torch.float64)
    arguments = (x, at, sign, x[0].clone(), torch.zeros(16, 6), 3, sums[0], sums[1].clone(), "gelu")
    torch.library.opcheck(registered.accumulate_ring_, arguments)
