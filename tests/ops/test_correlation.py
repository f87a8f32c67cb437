"""The correlation op against float64: accuracy, streaming, masks, merging, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ffmerge_fast as ff
from ffmerge_fast.ops.common.activations import FORWARD
from ffmerge_fast.ops.correlation import registered
from ffmerge_fast.testing import assert_close_to_float64, nan_poisoned_empty, no_recompile
from tests.helpers.correlation import correlate, features, state_of, tolerance, truth


@pytest.fixture(scope="module", autouse=True)
def backend(correlation_backend):
    return correlation_backend


@pytest.mark.parametrize("tokens, width_a, width_b", [(2, 1, 1), (63, 63, 100), (431, 100, 431), (512, 64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1000])
def test_matches_float64(backend, tokens, width_a, width_b, dtype, offset):
    x = {0: features(tokens, width_a, 1, offset).to(dtype), 1: features(tokens, width_b, 2, offset).to(dtype)}
    with nan_poisoned_empty():
        state = correlate(x, splits=(tokens // 2,))
        c = state.correlation(0, 1)
    assert c.dtype == torch.float32 and state.count(0) == tokens
    allowed = tolerance(backend, dtype, tokens)
    torch.testing.assert_close(c.double(), truth(x[0], x[1]), rtol=0, atol=allowed)
    torch.testing.assert_close(state.mean(0), x[0].double().mean(0), rtol=1e-9, atol=1e-7)
    expected = x[1].double().var(0, correction=0)
    torch.testing.assert_close(state.variance(1), expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(state.correlation(1, 0), c.T, rtol=0, atol=0)


def test_large_offset_is_where_raw_moments_fail(backend):
    x = {0: features(2000, 50, 1, 1000.0), 1: features(2000, 50, 2, 1000.0)}
    expected = truth(x[0], x[1])
    a, b = x[0], x[1]
    raw = (a.T @ b / 2000 - a.mean(0)[:, None] * b.mean(0)) / (a.std(0)[:, None] * b.std(0))
    c = correlate(x, splits=(1, 700)).correlation(0, 1)  # a pivot from one single token must do as well
    assert (raw - expected).abs().max() > 1e-3
    assert (c - expected).abs().max() <= 1.2 * tolerance(backend, torch.float32, 2000)


def test_two_times_rule():
    x = {0: features(431, 63, 1), 1: features(431, 100, 2)}
    plain = torch.corrcoef(torch.cat([x[0], x[1]], 1).T)[:63, 63:]
    ours = correlate(x, splits=(100, 163), compute="fp32").correlation(0, 1)
    assert_close_to_float64(ours, plain, truth(x[0], x[1]))


@pytest.mark.parametrize("compute", ["auto", "bf16x3", "fp32", "bf16"])
def test_compute_types(backend, compute):
    x = {0: features(431, 63, 1, 100.0), 1: features(431, 63, 2, 100.0)}
    error = (correlate(x, splits=(100,), compute=compute).correlation(0, 1) - truth(x[0], x[1])).abs().max()
    allowed = {"bf16": 3e-3, "fp32": 1e-6}.get(compute, tolerance(backend, torch.float32, 431))
    assert error <= allowed
    assert error > 1e-5 or compute != "bf16"


def test_fp64_is_exact_to_float32_output():
    x = {0: features(431, 63, 1, 5.0).double(), 1: features(431, 63, 2, 5.0).double()}
    state = correlate(x, splits=(100,), compute="fp64")
    torch.testing.assert_close(state.correlation(0, 1), truth(x[0], x[1]).float(), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("name", FORWARD)
def test_activation_is_applied_first(backend, name):
    x = {0: features(100, 63, 1), 1: 4 * features(100, 63, 2)}
    function = FORWARD[name]
    expected = truth(function(x[0].double()), function(x[1].double()))
    state = correlate(x, activation=name)
    allowed = 3 * tolerance(backend, torch.float32, 100)  # relu2 has a heavy tail
    torch.testing.assert_close(state.correlation(0, 1).double(), expected, rtol=0, atol=allowed)
    torch.testing.assert_close(state.mean(1), function(x[1].double()).mean(0), rtol=0, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_features_have_correlation_zero(backend, dtype):
    x = {0: features(300, 40, 1).to(dtype), 1: features(300, 40, 2).to(dtype)}
    for column, value in enumerate((0.0, 1e4, -3.3, 1e-3, 1e30)):
        x[0][:, column] = value
    c = correlate(x, splits=(7, 100)).correlation(0, 1)
    assert torch.equal(c[:5], torch.zeros(5, 40))
    expected = truth(x[0], x[1]) * (torch.arange(40) >= 5)[:, None]
    torch.testing.assert_close(c.double(), expected, rtol=0, atol=tolerance(backend, dtype, 300))


def test_rounding_noise_of_a_constant_is_no_variance(backend):
    x = {0: features(300, 3, 1), 1: features(300, 3, 2)}
    x[0][:, 0] = 1e4
    x[0][::2, 0] = torch.nextafter(torch.tensor(1e4), torch.tensor(2e4))  # one unit in the last place
    x[0][:, 1] = 1e4 * (1 + 1e-5 * x[0][:, 1])  # a signal, if a small one
    state = correlate(x)
    assert torch.equal(state.correlation(0, 1)[0], torch.zeros(3)) and state.variance(0)[0] == 0
    torch.testing.assert_close(state.correlation(0, 1)[1].double(), truth(x[0], x[1])[1], rtol=0, atol=1e-6)


def test_mask_equals_leaving_tokens_out(backend):
    x = {0: features(90, 20, 1, 50.0), 1: features(90, 30, 2, 50.0)}
    mask = torch.rand(90, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[:20] = False  # a first batch without tokens must not set the pivot
    kept = correlate({key: value[mask] for key, value in x.items()}).correlation(0, 1)
    for value in x.values():
        value[~mask] = torch.nan  # padding may hold anything
    state = correlate(x, splits=(20, 47), mask=mask)
    assert state.count(0) == state.count(1) == int(mask.sum())
    allowed = 2 * tolerance(backend, torch.float32, int(mask.sum()))
    torch.testing.assert_close(state.correlation(0, 1), kept, rtol=0, atol=allowed)
    batched = {key: value.reshape(6, 15, -1) for key, value in x.items()}
    again = ff.ops.correlation_accumulate_(state_of(x), batched, mask.reshape(6, 15).long())
    torch.testing.assert_close(again.correlation(0, 1), kept, rtol=0, atol=allowed)


def test_non_contiguous_and_zero_tokens(backend):
    wide = features(63, 80, 1)
    x = {0: wide[:, ::2], 1: features(40, 63, 2).T}
    state = correlate(x)
    before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    ff.ops.correlation_accumulate_(state, {0: torch.empty(0, 40), 1: torch.empty(0, 40)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.state_dict().items())
    allowed = tolerance(backend, torch.float32, 63)
    torch.testing.assert_close(state.correlation(0, 1).double(), truth(x[0], x[1]), rtol=0, atol=allowed)


def test_self_pair_and_covariance(backend):
    x = {0: features(200, 30, 1, 10.0), 1: features(200, 50, 2)}
    state = correlate(x, splits=(50,), pairs=[(0, 0), (0, 1), (1, 0)])
    assert len(state.pairs) == 2
    allowed = 3 * tolerance(backend, torch.float32, 200)  # variances are about 1, but not all correlations are 0
    torch.testing.assert_close(state.correlation(0, 0).diagonal(), torch.ones(30), rtol=0, atol=allowed)
    joint = torch.cov(torch.cat([x[0], x[1]], 1).double().T, correction=0)
    torch.testing.assert_close(state.covariance(0, 0).double(), joint[:30, :30], rtol=0, atol=allowed)
    torch.testing.assert_close(state.covariance(1, 0).double(), joint[30:, :30], rtol=0, atol=allowed)


def test_push_releases_features_after_the_last_partner():
    keys = list(range(6))
    band = [(a, b) for a in keys for b in keys if 0 < b - a < 3]
    state = ff.CorrelationState(dict.fromkeys(keys, 4), band)
    tokens = state._moments.accumulators.packing.tokens_per_product + 19  # enough to be multiplied at once
    x = {key: features(tokens, 4, key) for key in keys}
    held = []
    for key in keys:
        state.push(key, x[key])
        held.append(state._moments.accumulators.held())
    assert held == [1, 2, 2, 2, 2, 0]
    state.end_batch()
    torch.testing.assert_close(state.correlation(5, 3).double(), truth(x[5], x[3]), rtol=0, atol=2e-6)


def test_same_features_give_the_same_bits_under_autocast_and_grad():
    x = {0: features(100, 63, 1).requires_grad_(), 1: features(100, 63, 2).requires_grad_()}
    plain = correlate(x).correlation(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        state = correlate(x)
        cast = state.correlation(0, 1)
    assert torch.equal(plain, cast) and not cast.requires_grad


@settings(max_examples=25, deadline=None)
@given(splits=st.lists(st.integers(0, 200), max_size=4).map(sorted), offset=st.sampled_from([0.0, 30.0, 1000.0]))
def test_any_split_into_batches_or_states_agrees(backend, splits, offset):
    x = {0: features(200, 12, 1, offset), 1: features(200, 9, 2, offset)}
    expected = truth(x[0], x[1])
    allowed = 3 * tolerance(backend, torch.float32, 200)  # a pivot from one token costs some accuracy
    assert (correlate(x, splits=splits).correlation(0, 1) - expected).abs().max() <= allowed
    merged = state_of(x)
    for start, stop in zip([0, *splits], [*splits, 200], strict=True):
        merged.merge_(correlate({key: value[start:stop] for key, value in x.items()}))
    assert merged.count(0) == 200
    assert (merged.correlation(0, 1) - expected).abs().max() <= allowed
    merged.merge_(correlate(x))  # the same tokens again change nothing
    assert (merged.correlation(0, 1) - expected).abs().max() <= allowed


def test_merge_of_very_different_means(backend):
    x = {0: features(200, 12, 1), 1: features(200, 9, 2)}
    x[0][100:] += 500
    x[1][100:] -= 300
    halves = [correlate({key: value[part] for key, value in x.items()}) for part in (slice(0, 100), slice(100, 200))]
    merged = halves[0].merge_(halves[1])
    assert (merged.correlation(0, 1) - truth(x[0], x[1])).abs().max() <= tolerance(backend, torch.float32, 200)
    torch.testing.assert_close(merged.variance(0), x[0].double().var(0, correction=0), rtol=1e-9, atol=0)


def test_state_dict_round_trip_continues_the_stream():
    x = {"encoder.0": features(100, 12, 1, 9.0), "encoder.1": features(100, 9, 2, 9.0)}
    first, rest = ({key: value[part] for key, value in x.items()} for part in (slice(0, 40), slice(40, 100)))
    make = lambda: ff.CorrelationState({"encoder.0": 12, "encoder.1": 9}, [("encoder.0", "encoder.1")])  # noqa: E731
    whole = make()
    ff.ops.correlation_accumulate_(whole, first)
    saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    assert {"layer/encoder.0/pivot", "layer/encoder.1/count", "pair/encoder.0|encoder.1"} <= saved.keys()
    resumed = make().load_state_dict_(saved)
    for state in (whole, resumed):
        ff.ops.correlation_accumulate_(state, rest)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    with pytest.raises(ff.FFMergeError, match="state_dict: missing="):
        make().load_state_dict_({})
    saved["layer/encoder.0/sum"] = saved["layer/encoder.0/sum"].float()
    with pytest.raises(ff.FFMergeError, match="layer/encoder.0/sum is torch.float32"):
        make().load_state_dict_(saved)


def test_all_reduce_of_one_process_changes_nothing(backend):
    x = {0: features(200, 12, 1, 100.0), 1: features(200, 9, 2, 100.0)}
    alone = correlate(x).all_reduce_()
    assert alone.count(0) == 200
    assert (alone.correlation(0, 1) - truth(x[0], x[1])).abs().max() <= tolerance(backend, torch.float32, 200)


def _reduce(rank, directory):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    x = {0: features(200, 12, 1, 100.0), 1: features(200, 9, 2, 100.0)}
    mine = slice(0, 60) if rank == 0 else slice(60, 200)
    split = correlate({key: value[mine] for key, value in x.items()}).all_reduce_()
    empty_here = state_of(x)
    if rank == 0:
        ff.ops.correlation_accumulate_(empty_here, x)
    empty_here.all_reduce_()
    torch.save([split.state_dict(), empty_here.state_dict()], f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_all_reduce_with_different_data_and_an_empty_rank(backend, tmp_path):
    torch.multiprocessing.spawn(_reduce, (str(tmp_path),), nprocs=2)
    x = {0: features(200, 12, 1, 100.0), 1: features(200, 9, 2, 100.0)}
    for rank in range(2):
        for tensors in torch.load(tmp_path / f"{rank}.pt"):
            state = state_of(x).load_state_dict_(tensors)
            assert state.count(0) == state.count(1) == 200
            assert (state.correlation(0, 1) - truth(x[0], x[1])).abs().max() <= tolerance(backend, torch.float32, 200)
            torch.testing.assert_close(state.variance(1), x[1].double().var(0, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.pop(1), r"layers \[1\] are missing"),
        (lambda x: x.update({2: x[0]}), "got 2, want one of the layers"),
        (lambda x: x.update({1: x[1][:5]}), "different token counts"),
        (lambda x: x.update({1: x[1][:, :3]}), r"got shape \[10, 3\], want \[tokens, 6\]"),
        (lambda x: x.update({1: x[1].long()}), "got torch.int64, want a float32"),
        (lambda x: x.update({1: None}), "got NoneType, want a float32"),
    ],
)
def test_a_bad_batch_changes_nothing(change, message):
    x = {0: features(10, 4, 1), 1: features(10, 6, 2)}
    state = state_of(x)
    change(x)
    with pytest.raises(ff.FFMergeError, match=message) as error:
        ff.ops.correlation_accumulate_(state, x)
    assert "\n" not in str(error.value)
    assert not any(tensor.any() for tensor in state.state_dict().values())


def test_push_errors():
    x = {0: features(10, 4, 1), 1: features(10, 6, 2)}
    state = state_of(x)
    mask = torch.ones(10, dtype=torch.bool)
    state.push(0, x[0], mask)
    for message, call in {
        "pushed twice": lambda: state.push(0, x[0], mask),
        "9 tokens, its pair 0 has 10": lambda: state.push(1, x[1][:9]),
        "different masks": lambda: state.push(1, x[1]),
        r"mask: got shape \[3\], want 10": lambda: state.push(1, x[1], mask[:3]),
        "a batch is open": lambda: state.correlation(0, 1),
        "call end_batch": lambda: ff.ops.correlation_accumulate_(state, x),
        r"layers \[1\] were not pushed": state.end_batch,
    }.items():
        with pytest.raises(ff.FFMergeError, match=message):
            call()
    state.push(0, x[0], mask)  # end_batch has reset the batch
    state.push(1, x[1], mask.clone())
    state.end_batch()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_non_finite_features_name_their_layer(value):
    x = {0: features(10, 4, 1), 1: features(10, 6, 2)}
    x[1][3, 2] = value
    with pytest.raises(ff.FFMergeError, match=r"layers \[1\] hold NaN, Inf"):
        correlate(x)


def test_state_argument_errors():
    for message, arguments in {
        "compute: got 'int8'": ({0: 4}, [], "cpu", "int8"),
        "activation: got 'tanh'": ({0: 4}, [], "cpu", "auto", "tanh"),
        "names layer 7": ({0: 4}, [(0, 7)]),
        "width 0": ({0: 0}, []),
        "widths: empty": ({}, []),
        "not different as strings": ({0: 4, "0": 4}, []),
    }.items():
        with pytest.raises(ff.FFMergeError, match=message):
            ff.CorrelationState(*arguments)
    state = ff.CorrelationState({0: 4, 1: 4, 2: 4}, [(0, 1)])
    with pytest.raises(ff.FFMergeError, match=r"pair \(0, 2\) was not accumulated"):
        state.correlation(0, 2)
    with pytest.raises(ff.FFMergeError, match="has seen no tokens"):
        state.correlation(0, 1)
    with pytest.raises(ff.FFMergeError, match="differ in pairs"):
        state.merge_(ff.CorrelationState({0: 4, 1: 4, 2: 4}, [(1, 2)]))


def _layer_arguments(x, mask=None, activation=None, compute="fp32"):
    width = x.shape[1]
    sums = [torch.zeros(width, dtype=t) for t in (torch.float32, torch.float64, torch.float64)]
    return (x, mask, torch.zeros((), dtype=torch.int64), *sums, activation, compute, True)


def test_opcheck():
    x = features(20, 6, 1)
    torch.library.opcheck(registered.accumulate_layer_, _layer_arguments(x))
    torch.library.opcheck(
        registered.accumulate_layer_, _layer_arguments(x.bfloat16(), torch.rand(20) < 0.5, "gelu", "bf16")
    )
    torch.library.opcheck(registered.accumulate_pair_, (x, features(20, 4, 2), torch.zeros(6, 4)))


def test_compiles_whole_and_not_again_for_other_token_counts():
    def step(a, b, sums_a, sums_b, products):
        packed = [
            registered.accumulate_layer_(x, None, *sums, "gelu", "fp32", False)
            for x, sums in ((a, sums_a), (b, sums_b))
        ]
        registered.accumulate_pair_(*packed, products)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    results = []
    for function in (step, compiled):
        sums = [_layer_arguments(torch.zeros(2, width))[2:6] for width in (6, 4)]
        products = torch.zeros(6, 4)
        function(features(20, 6, 1), features(20, 4, 2), *sums, products)
        with no_recompile():
            function(features(33, 6, 1), features(33, 4, 2), *sums, products)
        results.append([*sums[0], *sums[1], products])
    for eager, compiled_result in zip(*results, strict=True):
        assert eager.any() or eager.dtype == torch.float32
        torch.testing.assert_close(compiled_result, eager, rtol=0, atol=0)
