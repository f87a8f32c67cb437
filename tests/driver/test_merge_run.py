"""A merge and its recoveries from Python: what `ffmerge merge` does with --recover."""

from __future__ import annotations

import json

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.driver.merge_run import RECOVERIES, merge_and_recover_
from ffmerge_fast.merging import settings
from tests.helpers.tiny_models import tiny_inputs, tiny_model

pytest.importorskip("transformers")
OPTIONS = {"refit": {"ridge": 0.1}, "distill": {"steps": 20, "seed": 3}}


def batches():
    return [tiny_inputs(tiny_model("gpt2"), batch=4, length=32, seed=seed) for seed in range(4)]


def test_recoveries_follow_one_another():
    """The same as the calls one by one, each with the model of before as teacher."""
    teacher, model, wanted = (tiny_model("gpt2") for _ in range(3))
    plan = ff.plan(None, "1-3", method="average", model=teacher)
    run = merge_and_recover_(model, plan, ("refit", "distill"), batches=batches, options=OPTIONS)
    ff.merge_(wanted, plan)
    reports = {
        "refit": ff.refit_(wanted, teacher, batches(), **OPTIONS["refit"]),
        "distill": ff.local_distill_(wanted, teacher, batches(), **OPTIONS["distill"]),
    }
    assert all(torch.equal(p, wanted.get_parameter(name)) for name, p in model.named_parameters())
    assert run.reports == reports and list(run.seconds) == ["merge", "refit", "distill"]
    files = run.files()
    assert sorted(files) == sorted(f"{name}.{kind}" for name in ("plan", *reports) for kind in ("json", "txt"))
    assert json.loads(files["distill.json"]) == json.loads(json.dumps(reports["distill"].to_dict()))
    assert str(plan) in str(run) and str(reports["refit"]) in str(run)


def test_the_command_line_offers_all_recoveries():
    assert tuple(RECOVERIES) == settings.RECOVERIES


def test_merge_alone():
    model = tiny_model("gpt2")
    run = merge_and_recover_(model, ff.plan(None, "1-3", method="average", model=model))
    assert ff.is_merged(model) and not run.reports and sorted(run.files()) == ["plan.json", "plan.txt"]


@pytest.mark.parametrize(
    ("recoveries", "given", "message"),
    [(("magic",), batches, "recoveries: got 'magic', wanted refit or distill"), (tuple(RECOVERIES), None, "batches: ")],
)
def test_bad_recoveries(recoveries, given, message):
    model = tiny_model("gpt2")
    plan = ff.plan(None, "1-3", method="average", model=model)
    with pytest.raises(ff.FFMergeError, match=message):
        merge_and_recover_(model, plan, recoveries, batches=given)
    assert not ff.is_merged(model)
