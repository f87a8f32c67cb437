"""A call reads its model once: FFNs, axes, weights' fingerprint, tied tables; however large the model."""

import pytest

import ffmerge_fast as ff
from ffmerge_fast.models.sublayers import find_ffns
from ffmerge_fast.models.summary import fingerprint
from ffmerge_fast.projecting import importance as of_importance
from ffmerge_fast.projecting import settings
from ffmerge_fast.projecting.axes import ModelAxes
from ffmerge_fast.projecting.selection import tied_names
from tests.helpers.calls import count_calls
from tests.helpers.projecting import batches, scores
from tests.helpers.tiny_models import tiny_model

CALLS = {  # how often weights are read for the fingerprint, and tied tables looked for
    "project": (lambda m, imp: ff.project(m, keep=0.5), 1, 1),
    "project by given importances": (lambda m, imp: ff.project(m, keep=0.5, importance=imp), 1, 1),
    "hard_prune": (lambda m, imp: ff.hard_prune(m, d_model=8, importance=imp), 1, 1),
    "from_scratch": (lambda m, imp: ff.from_scratch(m, keep=0.5), 0, 1),
    "importance": (lambda m, imp: ff.importance(m, batches(m, 2), method="wanda"), 1, 0),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("family", ["gpt2", "marian"])
def test_a_call_reads_its_model_once(name, family, monkeypatch):
    call, fingerprints, tables = CALLS[name]
    model = tiny_model(family, layers=2)
    given = scores(model)
    ffns, marks, tied = (count_calls(monkeypatch, f) for f in (find_ffns, fingerprint, tied_names))
    read, layouts = ModelAxes.of, []
    monkeypatch.setattr(ModelAxes, "of", lambda m: layouts.append(m) or read(m))
    call(model, given)
    assert [len(calls) for calls in (ffns, layouts, marks, tied)] == [1, 1, fingerprints, tables]


def test_the_tables_have_the_names_of_the_settings():
    assert tuple(of_importance.METHODS) == settings.METHODS
    assert tuple(settings.OFFLOADS.values()) == settings.PLACES
