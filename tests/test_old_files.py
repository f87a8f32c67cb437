"""Files of an earlier version (tests/data/README.md) load, and its killed runs go on, with the values of that time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ffmerge_fast as ff
from ffmerge_fast.cli.main import main
from ffmerge_fast.merging.plan import MergePlan
from ffmerge_fast.projecting.importance import Importance

pytest.importorskip("transformers")
DATA = Path(__file__).with_name("data")
EXPECTED = load_file(DATA / "expected.safetensors")
NUMBERS = json.loads((DATA / "expected.json").read_text())
BATCHES = [{"input_ids": ids, "labels": ids} for ids in EXPECTED["ids"]]
MERGED = {"gpt2": [("decoder", (1, 2))], "llama": [("decoder", (0, 1))], "deltas": [("decoder", (0, 1, 2))]}
MERGED["marian"] = [("encoder", (0, 1)), ("decoder", (0, 1))]


@pytest.fixture
def base():
    return ff.from_pretrained(DATA / "gpt2").eval()


@pytest.fixture
def copied(tmp_path):
    """A copy of a file or folder, for runs that go on in it."""

    def copy(name):
        (shutil.copytree if (DATA / name).is_dir() else shutil.copy)(DATA / name, tmp_path / name)
        return tmp_path / name

    return copy


def check(found, name):
    torch.testing.assert_close(found, EXPECTED[name], rtol=1e-4, atol=1e-5)


def check_logits(model, name, **more):
    with torch.no_grad():
        check(model.eval()(input_ids=EXPECTED["ids"][0, :1], **more).logits, f"logits/{name}")


def log_of(work):
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def second_half():
    """The first three batches are counted in the caches: other ones must change nothing."""
    return [{"input_ids": torch.full_like(b["input_ids"], 5)} if i < 3 else b for i, b in enumerate(BATCHES)]


@pytest.mark.parametrize("name", MERGED)
def test_merged_folder(name):
    model = ff.from_pretrained(DATA / "merged" / name)
    assert ff.shared_groups(model) == MERGED[name]
    check_logits(model, name, **({"decoder_input_ids": EXPECTED["ids"][1, :1]} if name == "marian" else {}))
    assert ff.verify(DATA / "merged" / name)["logit_difference"] <= 1e-5


def test_statistics_and_plan(base):
    stats = ff.CorrelationStats.load(DATA / "statistics.safetensors")
    for i in range(2):
        check(stats.correlation(i, i + 1), f"correlation/{i}")
    saved = MergePlan.from_dict(json.loads((DATA / "plan.json").read_text()))
    check_logits(ff.merge(base, saved), "plan")
    check_logits(ff.merge(base, ff.plan(stats, layers="1-2")), "plan")


def test_collect_goes_on(base, copied):
    stats = ff.collect(base, second_half(), window=2, cache_dir=copied("collect-cache"))
    for i in range(2):
        check(stats.correlation(i, i + 1), f"correlation/{i}")


def test_search_goes_on(base, copied):
    stats, evaluated = ff.CorrelationStats.load(DATA / "statistics.safetensors"), []

    def evaluate(model):
        evaluated.append(ff.shared_groups(model))
        return 2.0

    plan = ff.search(base, stats, 2, evaluate, resume=copied("search.json"))
    assert evaluated == [[("decoder", (1, 2))]] and plan.search == [("0-1", 1.0), ("1-2", 2.0)]


def test_importance_is_read_and_goes_on(base, copied):
    saved = Importance.load(DATA / "importance.safetensors")
    saved.check(base)
    resumed = ff.importance(base, second_half(), cache_dir=copied("importance-cache"))
    for name, values in saved.scores.items():
        check(values, f"importance/{name}")
        check(resumed.scores[name], f"importance/{name}")


def test_finetune_goes_on(copied):
    model, options = ff.from_pretrained(DATA / "merged" / "gpt2"), dict(lr=1e-2, schedule="constant", log_every=1)
    result = ff.finetune(model, BATCHES, 6, output_dir=copied("finetune"), **options)
    assert result.history[:3] == log_of(DATA / "finetune")  # their speeds too: these steps were not run again
    assert [row["loss"] for row in result.history] == pytest.approx(NUMBERS["finetune"], rel=1e-5)


def test_project_goes_on_and_folds(copied, tmp_path):
    work, widths = copied("project"), "--d-model 4 --d-ff 8 --attention head_dim --calibration 2 --batch-size 4"
    training = "--max-length 24 --lr 0.01 --schedule constant --eval-every 2 --eval-limit 4 --steps 4 --quiet"
    options = [*widths.split(), *training.split(), "--data", str(DATA / "text.txt"), "--work-dir", str(work)]
    assert main(["project", str(DATA / "gpt2"), str(tmp_path / "small"), *options]) == 0
    rows, before = log_of(work), log_of(DATA / "project")
    assert rows[: len(before)] == before
    metrics = [(row["step"], row["metric"]) for row in rows if "metric" in row]
    assert metrics == [(step, pytest.approx(metric, rel=1e-5)) for step, metric in NUMBERS["project"]]
    assert main(["fold", str(DATA / "gpt2"), str(work), str(tmp_path / "folded"), "--quiet"]) == 0
    for folder in ("small", "folded"):
        check_logits(ff.from_pretrained(tmp_path / folder), "project")
