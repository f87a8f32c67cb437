"""The whole pipeline, by the command line, on real trained models and real data."""

from __future__ import annotations

import pytest

from benchmarks.real_models import CASES, run

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
