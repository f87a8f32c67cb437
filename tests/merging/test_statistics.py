"""CorrelationStats: save, load, merge, and damaged files."""

import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ffmerge_fast as ff
from tests.helpers.tiny_models import tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*correlations are noisy")


def collected(name="gpt2", seeds=range(3), model_seed=0, layers=3, **wanted):
    model = tiny_model(name, layers=layers, seed=model_seed)
    return ff.collect(model, [tiny_inputs(model, seed=s, padded=True) for s in seeds], **(dict(window=2) | wanted))


def tensors(stats):
    return {f"{stack}/{k}": t for stack, state in stats.states.items() for k, t in state.state_dict().items()}


def assert_equal(a, b):
    assert a.model == b.model and a.settings == b.settings and a.tokens == b.tokens
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "marian"])
def test_save_and_load_are_inverse(tmp_path, name):
    stats = collected(name)
    stats.save(tmp_path / "new" / "stats.safetensors")
    again = ff.CorrelationStats.load(tmp_path / "new" / "stats.safetensors")
    assert_equal(stats, again)
    assert ff.plan(stats, "0-1").to_dict() == ff.plan(again, "0-1").to_dict()
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["stats.safetensors"]


def test_the_file_holds_each_sum_once_and_says_what_it_is(tmp_path):
    stats = collected()
    stats.save(tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        assert sorted(file.keys()) == sorted(tensors(stats))
        assert stats.model.fingerprint in file.metadata()["ffmerge"]
    payload = sum(t.numel() * t.element_size() for t in tensors(stats).values())
    assert payload < (tmp_path / "s").stat().st_size < payload + 20_000


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_merging_adds_up_the_tokens(name):
    whole, a, b = collected(name, range(5)), collected(name, range(2)), collected(name, range(2, 5))
    assert ff.plan(a, "0-1").mean_correlation != ff.plan(whole, "0-1").mean_correlation
    merged = a.merge(b)
    assert merged is a and a.tokens == whole.tokens
    for stack, pairs in whole.settings["pairs"].items():
        for i, j in pairs:
            torch.testing.assert_close(a.correlation(i, j, stack), whole.correlation(i, j, stack), atol=1e-6, rtol=0)
            assert a.alignment(i, j, stack).matched == pytest.approx(whole.alignment(i, j, stack).matched, abs=1e-6)


def test_statistics_that_do_not_fit_are_not_merged():
    stats = collected()
    before = {k: t.clone() for k, t in tensors(stats).items()}
    for other, message in (
        (collected(model_seed=1), "different models"),
        (collected("llama"), "different models"),
        (collected(window=3), "differ in pairs"),
        (collected(features="post"), "differ in features"),
    ):
        with pytest.raises(ff.FFMergeError, match=message):
            stats.merge(other)
    assert all(torch.equal(t, before[k]) for k, t in tensors(stats).items())


def test_the_other_way_round_is_the_transposed_and_inverse_one():
    stats = collected()
    assert torch.equal(stats.correlation(1, 0), stats.correlation(0, 1).T)
    there, back = stats.alignment(0, 1), stats.alignment(1, 0)
    assert torch.equal(there.permutation.argsort(), back.permutation) and there.matched == pytest.approx(back.matched)


def test_a_stack_must_be_named_where_there_are_two():
    stats = collected("marian")
    with pytest.raises(ff.FFMergeError, match="say which of encoder, decoder"):
        stats.correlation(0, 1)
    with pytest.raises(ff.FFMergeError, match="got 'middle', these statistics have encoder, decoder"):
        stats.correlation(0, 1, "middle")
    with pytest.raises(ff.FFMergeError, match=r"pair \(0, 2\) was not accumulated"):
        stats.correlation(0, 2, "decoder")


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "stats.safetensors"
    collected().save(path)
    return path


def assert_refused(path, message=""):
    with pytest.raises(ff.FFMergeError) as error:
        ff.CorrelationStats.load(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path):
    assert_refused(tmp_path / "nothing", "is not a file; make it with `ffmerge collect`")
    assert_refused(tmp_path, "is not a file")


@pytest.mark.parametrize("left", [0, 7, 100, 0.5, -1])
def test_a_truncated_file(good, left):
    content = good.read_bytes()
    good.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    assert_refused(good, "is damaged")


def test_a_flipped_bit_anywhere_is_noticed(good):
    content = good.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    choice = random.Random(0)
    places = [choice.randrange(header) for _ in range(150)] + [
        choice.randrange(header, len(content)) for _ in range(50)
    ]
    for place in places:
        bad = bytearray(content)
        bad[place] ^= 1 << choice.randrange(8)
        good.write_bytes(bytes(bad))
        assert_refused(good)
    good.write_bytes(content)
    assert ff.CorrelationStats.load(good).tokens == collected().tokens


def test_other_files_are_refused(good):
    save_file({"x": torch.zeros(2)}, good)
    assert_refused(good, "is a safetensors file, but not one of statistics")
    good.write_text("not even safetensors")
    assert_refused(good, "is damaged")


def test_a_failed_save_leaves_the_old_file(good, monkeypatch):
    before = good.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ff.FFMergeError, match=f"{good} could not be written .*No space left"):
        collected(seeds=[7]).save(good)
    assert good.read_bytes() == before and [f.name for f in good.parent.iterdir()] == [good.name]


def test_equal_statistics_are_equal_files(tmp_path):
    """safetensors writes metadata in another order each time."""
    stats = collected()
    for number in range(8):
        stats.save(tmp_path / f"{number}")
    collected().save(tmp_path / "again")
    ff.CorrelationStats.load(tmp_path / "0").save(tmp_path / "loaded")
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
