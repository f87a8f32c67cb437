"""Merging by the command line, and projecting beside pruning, on real trained models and real data."""

from __future__ import annotations

import pytest

import ffmerge_fast as ff
from benchmarks.studies import projection_quality, quality
from benchmarks.studies.real_models import CASES, run

pytest.importorskip("transformers")
pytest.importorskip("sacrebleu")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_third_of_the_ffns_goes(shared, tmp_path, case):
    if not (shared / "models" / case.name).is_dir():
        pytest.skip(f"no model {case.name} in {shared}")
    row = run(shared, case, tmp_path, limit=60)
    removed = {"vit-cifar10": -0.2188, "gpt2-pystdlib": -4 * 131_712 / 2_658_048, "marian-en-de": -0.1099}
    assert row["parameters"] == pytest.approx(removed[case.name], abs=1e-4)
    worse = row["permute"] - row["before"] if row["metric"] == "perplexity" else row["before"] - row["permute"]
    limits = {"perplexity": 0.15 * row["before"], "accuracy": 0.12, "bleu": 5.0}  # un-tuned, on 60 examples
    assert worse < limits[row["metric"]], row
    if row["metric"] != "accuracy":  # where alignment matters most: it must beat plain averaging
        better = row["average"] - row["permute"] if row["metric"] == "perplexity" else row["permute"] - row["average"]
        assert better > 0, row


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", projection_quality.CASES)
def test_half_of_the_parameters_goes(shared, name):
    """Equal tokens for all. What a few steps show for certain; `projection_quality` has the whole table."""
    case = projection_quality.CASES[name]
    model = ff.from_pretrained(str(shared / "models" / name)).eval()
    task = quality.CASES[name].build(shared, model)
    task.metric = "loss"
    batches = list(task.batches("train", case.batch_size, shuffle=True, limit=12 * case.batch_size))
    scores = ff.importance(model, batches)

    def loss(m):
        return task.score(m, "validation", limit=case.validation)

    def trained(student, lr, optimizer=None):
        ff.finetune(student, batches, len(batches), lr, schedule="linear", warmup=2, optimizer=optimizer)
        return loss(student)

    pruned, selected, turned = (
        ff.hard_prune(model, 0.5, importance=scores), ff.project(model, 0.5, importance=scores),
        ff.project(model, 0.5, importance=scores, init="svd"),
    )  # fmt: skip
    base, start = loss(model), loss(pruned)
    lost = start - base
    assert lost > 0.15 and loss(selected.student) == start
    assert loss(turned.student) - base < 0.5 * lost  # directions keep more than coordinates, before any training
    fitted = ff.project(model, 0.5, importance=scores, init="svd")
    fitted.reconstruct_(batches)
    assert loss(fitted.student) - base < 0.2 * lost
    of_pruned = trained(pruned, 1e-3)
    of_projected = trained(selected.student, 3e-4, selected.optimizer())
    of_turned = trained(turned.student, 3e-4, turned.optimizer())
    assert max(of_pruned, of_projected) - base < 0.8 * lost
    assert of_projected - of_pruned < 0.1 * lost
    assert of_turned < min(of_pruned, of_projected)
    assert trained(fitted.student, 3e-5, fitted.optimizer()) < of_turned
