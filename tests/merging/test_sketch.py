"""Statistics by sketch: what is chosen, plans from them, files, resuming, and what is refused."""

import dataclasses

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.merging.sketching import FEWEST_ROWS, chosen_rows, exact_cost, sketch_cost
from tests.helpers.tiny_models import D_FF, tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*correlations are noisy")


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt2", layers=5)


@pytest.fixture(scope="module")
def batches(model):
    return [tiny_inputs(model, batch=8, seed=seed, padded=True) for seed in range(12)]


@pytest.fixture(scope="module")
def exact(model, batches):
    return ff.collect(model, batches, window=3)


@pytest.fixture(scope="module")
def sketched(model, batches):
    return ff.collect(model, batches, window=3, sketch=64)


def test_costs_by_hand(model):
    ffns, pairs = ff.find_ffns(model), {"decoder": [(0, 1), (0, 2), (1, 2)]}
    assert exact_cost(pairs, ffns, 1000) == (3 * 4 * D_FF**2, 3 * 1000 * D_FF**2)
    assert sketch_cost(pairs, ffns, 1000, 64) == (3 * 4 * 64 * D_FF, 3 * 1000 * D_FF + 3 * 64 * D_FF**2)


def test_what_auto_chooses(model):
    ffns = ff.find_ffns(model)
    wide = [dataclasses.replace(ffn, d_ff=3072) for ffn in ffns]
    pairs = {"decoder": [(i, j) for i in range(5) for j in range(i + 1, 5)]}
    wide = type(ffns)(wide)
    assert chosen_rows(None, pairs, wide, 10_000) is None
    assert chosen_rows("auto", pairs, wide, 10_000) == FEWEST_ROWS
    assert chosen_rows("auto", pairs, wide, 2 * FEWEST_ROWS - 1) is None  # few tokens
    assert chosen_rows("auto", pairs, wide, 10_000, max_memory=10**6) is None
    for width, rows in ((3584, 1024), (5120, 2048), (14336, 4096)):
        widened = type(ffns)([dataclasses.replace(ffn, d_ff=width) for ffn in ffns])
        assert chosen_rows("auto", pairs, widened, 10_000) == rows
    narrow = type(ffns)([dataclasses.replace(ffn, d_ff=4) for ffn in ffns])
    assert chosen_rows("auto", {"decoder": [(0, 1)]}, narrow, 2 * FEWEST_ROWS) is None  # exact is cheaper in both
    assert chosen_rows(100, pairs, narrow, 100) == 100


def test_estimates_and_their_error(exact, sketched):
    assert exact.sketch is None and exact.sketch_error == 0
    assert sketched.sketch == 64 and sketched.sketch_error == 1 / 8
    errors = torch.stack([sketched.correlation(i, j) - exact.correlation(i, j) for i, j in ((0, 1), (1, 3), (2, 4))])
    assert 0.5 < errors.std() / sketched.sketch_error < 1.5
    assert sketched.correlation(0, 4).shape == (D_FF, D_FF)  # outside of the window
    assert sketched.holds("decoder", 0, 4) and not exact.holds("decoder", 0, 4)
    assert not sketched.holds("decoder", 0, 5) and not sketched.holds("encoder", 0, 1)
    with pytest.raises(ff.FFMergeError, match="not accumulated"):
        exact.correlation(0, 4)


def test_plans_say_what_they_were_made_of(exact, sketched):
    assert ff.plan(exact, layers="1-3").sketched is None
    for made in (ff.plan(sketched, layers="0-4"), ff.plan(sketched, window=3)):
        assert made.sketched.rows == 64 and 0 <= made.sketched.expected_loss < 1
        assert "sketches of 64 rows: expected loss" in str(made)
        again = ff.MergePlan.from_dict(made.to_dict())
        assert again.sketched == made.sketched and str(again) == str(made)
    assert ff.plan(sketched, layers="0-4", method="average").sketched is None
    values = ff.plan(sketched, layers="0-1").to_dict()
    for wrong in ([3, 0.1], [64, "nan"], [64, -1.0], [64]):
        with pytest.raises(ff.FFMergeError, match="not the content of a plan"):
            ff.MergePlan.from_dict(values | {"sketched": wrong})


def test_expected_loss_is_near_the_true_one():
    """Features whose best match is known and uncertain: the estimate needs no exact correlation to see by how much."""
    g = torch.Generator().manual_seed(0)
    factors, d = torch.randn(8192, 30, generator=g), 200
    mix = torch.randn(30, d, generator=g)
    x = {
        i: factors @ (mix + 1.5 * torch.randn(30, d, generator=g)) + 6 * torch.randn(8192, d, generator=g)
        for i in (0, 1)
    }
    exact, sketch = (ff.CorrelationState({0: d, 1: d}, [(0, 1)], sketch=m) for m in (None, 256))
    for state in (exact, sketch):
        ff.ops.correlation_accumulate_(state, x)
    truth = exact.correlation(0, 1).double()
    best = ff.ops.assign(truth).objective
    model = tiny_model("gpt2", layers=2)
    stats = ff.collect(model, [tiny_inputs(model)], window=2, sketch=16)
    stats.states["decoder"] = sketch
    permutation = stats.alignment(0, 1).permutation
    lost = 1 - truth[torch.arange(d), permutation].sum().item() / best
    assert 0.01 < lost < 0.2
    assert 0.4 < stats.expected_loss(0, 1) / lost < 2.5


def test_search_takes_them(model, batches, sketched):
    def loss(merged):
        with torch.no_grad():
            return merged(**batches[0]).loss.item()

    found = ff.search(model, sketched, 3, loss)
    assert found.sketched.rows == 64 and len(found.search) == 3


def test_files(sketched, exact, tmp_path):
    sketched.save(tmp_path / "s")
    again = ff.CorrelationStats.load(tmp_path / "s")
    assert again.sketch == 64 and again.settings == sketched.settings
    assert torch.equal(again.correlation(0, 4), sketched.correlation(0, 4))
    exact.save(tmp_path / "e")
    assert "sketch" not in ff.CorrelationStats.load(tmp_path / "e").settings
    with pytest.raises(ff.FFMergeError, match="differ in sketch"):
        ff.CorrelationStats.load(tmp_path / "e").merge(again)


def test_merged_statistics(model, batches):
    parts = [ff.collect(model, some, window=2, sketch=64) for some in (batches[:5], batches[5:])]
    whole = ff.collect(model, batches, window=2, sketch=64)
    merged = parts[0].merge(parts[1])
    assert merged.tokens == whole.tokens
    state, expected = merged.states["decoder"], whole.states["decoder"]
    torch.testing.assert_close(state.variance(3), expected.variance(3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sketch", [64, 100])
def test_a_killed_run_goes_on_bit_for_bit(model, batches, tmp_path, sketch):
    whole = ff.collect(model, batches, window=3, sketch=sketch)

    def killed():
        yield from batches[:5]
        raise KeyboardInterrupt

    options = {"window": 3, "sketch": sketch, "cache_dir": tmp_path, "save_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        ff.collect(model, killed(), **options)
    again = ff.collect(model, batches, **options)
    assert torch.equal(again.correlation(0, 2), whole.correlation(0, 2)) and again.data is not None
    for other in (None, 32):
        with pytest.raises(ff.FFMergeError, match="sketch"):
            ff.collect(model, batches, **options | {"sketch": other})


def test_refused(model, batches):
    for wrong in (15, 0, 2.0, "few", True):
        with pytest.raises(ff.FFMergeError, match="sketch: got"):
            ff.collect(model, batches, window=2, sketch=wrong)
    with pytest.raises(ff.FFMergeError, match="64 rows for 63 tokens.*--exact"):
        ff.collect(model, batches, window=2, sketch=64, max_tokens=63)
