"""search: every window in memory, the best one returned, nothing left behind."""

import json
import math

import pytest
import torch

import ffmerge_fast as ff
from tests.helpers.tiny_models import logits, tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*correlations are noisy")


def setting(name="gpt2", layers=6, window=4):
    """(model, its statistics, an evaluation by loss)"""
    model = tiny_model(name, layers=layers)
    stats = ff.collect(model, [tiny_inputs(model, batch=8, seed=i) for i in range(3)], window=window)
    data = tiny_inputs(model, batch=4, seed=9)

    def loss(m):
        with torch.no_grad():
            return m(**data).loss.item()

    return model, stats, loss


def state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}, dict(
        model.named_modules()
    )


def assert_untouched(model, before):
    weights, modules = before
    assert dict(model.named_modules()) == modules and not ff.is_merged(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("method", ["permute", "average", "random", "weights"])
@pytest.mark.parametrize("anchor", ["first", "last"])
def test_every_window_is_scored_as_if_it_alone_were_merged(method, anchor):
    model, stats, loss = setting()
    before = state(model)
    found = ff.search(model, stats, window=3, evaluate=loss, method=method, anchor=anchor, seed=5)
    assert_untouched(model, before)
    assert [layers for layers, _ in found.search] == ["0-2", "1-3", "2-4", "3-5"]  # N - k + 1
    for layers, score in found.search:
        made = ff.plan(stats, layers=layers, method=method, anchor=anchor, model=model, seed=5)
        assert score == loss(ff.merge(model, made))
    assert len({score for _, score in found.search}) == 4
    assert found.layers == min(found.search, key=lambda entry: entry[1])[0]
    assert (found.method, found.groups[0].anchor) == (method, found.groups[0].layers[0 if anchor == "first" else -1])
    assert ff.merge(model, found).config.ffmerge["groups"][0]["layers"] == list(found.groups[0].layers)


def test_higher_is_better_takes_the_highest():
    model, stats, loss = setting()
    low = ff.search(model, stats, window=2, evaluate=loss)
    high = ff.search(model, stats, window=2, evaluate=lambda m: -loss(m), higher_is_better=True)
    worst = ff.search(model, stats, window=2, evaluate=loss, higher_is_better=True)
    assert low.layers == high.layers != worst.layers == max(low.search, key=lambda entry: entry[1])[0]


def test_encoder_and_decoder_move_in_step():
    model, stats, loss = setting("marian", layers=4)
    seen = []
    found = ff.search(model, stats, window=3, evaluate=lambda m: (seen.append(ff.shared_groups(m)), loss(m))[1])
    assert seen == [[("encoder", w), ("decoder", w)] for w in ((0, 1, 2), (1, 2, 3))]
    assert [layers for layers, _ in found.search] == ["encoder:0-2,decoder:0-2", "encoder:1-3,decoder:1-3"]
    assert [g.layers for g in found.groups] in ([(0, 1, 2)] * 2, [(1, 2, 3)] * 2)


def test_an_evaluation_that_fails_leaves_the_model_as_it_was():
    model, stats, _ = setting()
    model.train()
    before = state(model)

    def fail(m):
        assert ff.is_merged(m)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        ff.search(model, stats, window=2, evaluate=fail)
    assert_untouched(model, before)
    assert all(m.training for m in model.modules())


def test_the_model_is_evaluated_in_evaluation_mode_and_keeps_its_own():
    model, stats, loss = setting()
    scores = ff.search(model, stats, window=2, evaluate=loss).search
    model.train()
    model.transformer.h[1].eval()
    modes = {n: m.training for n, m in model.named_modules()}
    assert ff.search(model, stats, window=2, evaluate=loss).search == scores

    def meddling(m):
        score = loss(m)
        m.train()
        return score

    assert ff.search(model, stats, window=2, evaluate=meddling).search == scores
    assert {n: m.training for n, m in model.named_modules()} == modes


def test_scores_that_are_not_numbers():
    model, stats, loss = setting()
    calls = iter(range(9))

    def sometimes(m):
        return float("nan") if next(calls) == 1 else loss(m)

    found = ff.search(model, stats, window=3, evaluate=sometimes)
    assert math.isnan(found.search[1][1]) and not math.isnan(dict(found.search)[found.layers])
    with pytest.raises(ff.FFMergeError, match="every window's score is NaN or Inf; check `evaluate`"):
        ff.search(model, stats, window=3, evaluate=lambda m: float("nan"))
    assert not ff.is_merged(model)


def test_tensors_are_scores_too_and_the_first_of_equal_windows_wins():
    model, stats, _ = setting()
    assert ff.search(model, stats, window=3, evaluate=lambda m: torch.tensor(1.0)).layers == "0-2"
    assert ff.search(model, stats, window=3, evaluate=lambda m: 1, higher_is_better=True).layers == "0-2"


# -------------------------------------------------------------------------------------------------------------- resume


def test_a_killed_search_goes_on(tmp_path):
    model, stats, loss = setting()
    file, calls = tmp_path / "new" / "scores.json", []

    def counted(m, until):
        if len(calls) == until:
            raise KeyboardInterrupt
        calls.append(ff.shared_groups(m)[0][1])
        return loss(m)

    whole = ff.search(model, stats, window=3, evaluate=loss)
    with pytest.raises(KeyboardInterrupt):
        ff.search(model, stats, window=3, evaluate=lambda m: counted(m, 2), resume=file)
    assert list(json.loads(file.read_text())["scores"]) == ["0-2", "1-3"]
    found = ff.search(model, stats, window=3, evaluate=lambda m: counted(m, 99), resume=file)
    assert calls == [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5)]
    assert found.to_dict() == whole.to_dict()
    again = ff.search(model, stats, window=3, evaluate=lambda m: 1 / 0, resume=file)
    assert again.to_dict() == whole.to_dict() and [f.name for f in file.parent.iterdir()] == ["scores.json"]


def test_scores_that_are_nan_survive_a_resume(tmp_path):
    model, stats, _ = setting()
    file = tmp_path / "scores.json"
    scores = iter([float("nan"), 3.0, 2.0, 4.0])
    first = ff.search(model, stats, window=3, evaluate=lambda m: next(scores), resume=file)
    again = ff.search(model, stats, window=3, evaluate=lambda m: 1 / 0, resume=file)
    assert first.layers == again.layers == "2-4" and math.isnan(again.search[0][1])


def test_a_flipped_bit_of_the_scores_is_no_other_window(tmp_path):
    model, stats, _ = setting()
    file, scores = tmp_path / "scores.json", iter([1.5, 2.5, 3.5, 4.5])
    found = ff.search(model, stats, window=3, evaluate=lambda m: next(scores), resume=file)
    content, refused = file.read_bytes(), 0
    for place in range(content.index(b'"scores"'), len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            again = ff.search(model, stats, window=3, evaluate=lambda m: 1 / 0, resume=file)
            assert again.to_dict() == found.to_dict()
        except ff.FFMergeError as error:
            assert "resume: " in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 0.7 * (len(content) - content.index(b'"scores"'))


def test_the_file_of_another_search_is_refused(tmp_path):
    model, stats, loss = setting()
    file = tmp_path / "scores.json"
    ff.search(model, stats, window=3, evaluate=loss, resume=file)
    before = file.read_bytes()
    for change, name in (
        (dict(window=2), "window"),
        (dict(anchor="last"), "anchor"),
        (dict(method="average"), "method"),
    ):
        with pytest.raises(ff.FFMergeError, match=f"resume: .* was made with other {name}: .*--fresh"):
            ff.search(model, stats, evaluate=loss, resume=file, **dict(window=3) | change)
    ff.search(model, stats, 3, loss, resume=tmp_path / "m", signature={"metric": "loss"})
    with pytest.raises(ff.FFMergeError, match="was made with other metric: 'loss' there, 'accuracy' now"):
        ff.search(model, stats, 3, loss, resume=tmp_path / "m", signature={"metric": "accuracy"})
    others = ff.collect(model, [tiny_inputs(model, batch=8, seed=i) for i in range(1, 4)], window=4)
    with pytest.raises(ff.FFMergeError, match="was made with other statistics"):
        ff.search(model, others, 3, loss, resume=file)
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] += 1e-6
    with pytest.raises(ff.FFMergeError, match="was made with other weights"):
        ff.search(model, stats, 3, loss, resume=file)
    assert file.read_bytes() == before
    fresh = ff.search(model, stats, 2, lambda m: 7.0, resume=file, fresh=True)
    assert set(json.loads(file.read_text())["scores"].values()) == {7.0} == {score for _, score in fresh.search}
    for content in (
        "",
        "[1, 2]",
        "{}",
        '{"settings": 1, "scores": 2}',
        "\x00",
        '{"settings": {}, "scores": {"0-2": "x"}}',
    ):
        file.write_text(content)
        with pytest.raises(ff.FFMergeError, match="resume: ") as error:
            ff.search(model, stats, window=3, evaluate=loss, resume=file)
        assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_bad_arguments_are_refused_before_anything_is_evaluated():
    model, stats, _ = setting(window=3)
    other = tiny_model("gpt2", layers=6, seed=1)

    def never(m):
        raise AssertionError("evaluated")

    for changed, message in (
        (dict(window=7), "window: got 7, wanted 2 to 6"),
        (dict(window=1), "window: got 1"),
        (dict(evaluate="loss"), "evaluate: got 'loss', wanted a function"),
        (dict(model=other), "stats is of another model"),
        (dict(window=4), "no correlation of decoder layers 0 and 3; collect again"),
        (dict(anchor="best"), "anchor: got 'best'"),
        (dict(method="magic"), "method: got 'magic'"),
    ):
        with pytest.raises(ff.FFMergeError) as error:
            ff.search(**(dict(model=model, stats=stats, window=3, evaluate=never) | changed))
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not ff.is_merged(model) and logits(model, tiny_inputs(model)).isfinite().all()


def test_a_merged_model_is_refused():
    model, stats, loss = setting()
    ff.merge_(model, ff.plan(stats, "0-1"))
    with pytest.raises(ff.FFMergeError, match="merged already|of another model"):
        ff.search(model, stats, window=2, evaluate=loss)
