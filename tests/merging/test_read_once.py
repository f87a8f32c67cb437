"""A call reads its model once, a search twice: before the first window and after the last."""

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.models.sublayers import find_ffns
from ffmerge_fast.models.summary import fingerprint
from tests.helpers.calls import count_calls
from tests.helpers.tiny_models import tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*correlations are noisy")
CALLS = {
    "collect": lambda m, stats, data: ff.collect(m, data, window=2),
    "plan": lambda m, stats, data: ff.plan(stats, layers="0-1", model=m),
    "merge_": lambda m, stats, data: ff.merge_(m, ff.plan(stats, layers="0-1")),
    "merge": lambda m, stats, data: ff.merge(m, ff.plan(stats, layers="0-1")),
}


def setting(layers=4):
    model = tiny_model("gpt2", layers=layers)
    data = [tiny_inputs(model, batch=8, seed=i) for i in range(3)]
    return model, ff.collect(model, data, window=3), data


@pytest.mark.parametrize("name", CALLS)
def test_a_call_reads_its_model_once(name, monkeypatch):
    model, stats, data = setting()
    ffns, marks = (count_calls(monkeypatch, f) for f in (find_ffns, fingerprint))
    CALLS[name](model, stats, data)
    assert len(ffns) == len(marks) == 1


@pytest.mark.parametrize("layers", [3, 6])
@pytest.mark.parametrize("method", ["permute", "weights"])
@pytest.mark.parametrize("proxy", [False, True])
def test_a_search_reads_its_model_twice_whatever_the_number_of_windows(layers, method, proxy, monkeypatch):
    model, stats, data = setting(layers)
    ffns, marks = (count_calls(monkeypatch, f) for f in (find_ffns, fingerprint))
    options = dict(evaluate="proxy", batches=data) if proxy else dict(evaluate=lambda m: 1.0)
    found = ff.search(model, stats, window=3, method=method, **options)
    assert len(found.search) == layers - 2
    assert len(ffns) == len(marks) == 2


def test_a_search_says_if_its_evaluation_changed_the_weights():
    model, stats, data = setting()

    def tuned(m):
        with torch.no_grad():
            m.transformer.h[0].attn.c_attn.weight += 1
            return m(**data[0]).loss.item()

    with pytest.raises(ff.FFMergeError, match="stats is of another model .*make it again from this model"):
        ff.search(model, stats, window=2, evaluate=tuned)


def test_a_search_of_a_model_with_a_head_takes_statistics_of_the_model_without():
    model, _, data = setting()
    stats = ff.collect(model.transformer, [{"input_ids": batch["input_ids"]} for batch in data], window=2)
    found = ff.search(model, stats, window=2, evaluate=lambda m: 1.0)
    assert found.layers == "0-1"
