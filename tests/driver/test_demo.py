"""`ffmerge demo`: the two models, the table and the folder it leaves."""

from __future__ import annotations

import json

import pytest

import ffmerge_fast as ff
from ffmerge_fast.cli.main import main
from ffmerge_fast.driver import demo

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


@pytest.mark.slow
def test_demo(capsys, tmp_path):
    out = tmp_path / "demo"
    assert main(["demo", str(out), "--json"]) == 0
    rows = {(r["model"], r["variant"]): r for r in json.loads(capsys.readouterr().out)["rows"]}
    assert len(rows) == 20
    for model, good in (("vit-digits", lambda v: v > 0.9), ("gpt2-stdlib", lambda v: v < 70)):
        original, permuted = rows[model, "original"], rows[model, "permuted"]
        tuned, averaged = rows[model, "permuted + refit + tuned"], rows[model, "averaged"]
        assert good(original["value"]) and good(tuned["value"]), rows
        saved = ff.from_pretrained(out / model / "permuted-refit-tuned")
        assert len(ff.shared_groups(saved)[0][1]) == demo.WINDOW
        one_ffn = ff.find_ffns(saved)[0]
        assert original["parameters"] - permuted["parameters"] == (demo.WINDOW - 1) * one_ffn.parameters
        assert permuted["parameters"] == averaged["parameters"] == tuned["parameters"]
        assert original["bytes"] - permuted["bytes"] >= (demo.WINDOW - 1) * one_ffn.nbytes
        assert ff.verify(out / model / "permuted-refit-tuned")["logit_difference"] == 0.0
        pruned, projected = rows[model, "pruned"], rows[model, "projected + tuned"]
        assert good(projected["value"]) and projected["parameters"] == pruned["parameters"]
        assert 0.4 < projected["parameters"] / original["parameters"] < 0.7
        better = max if model == "vit-digits" else min
        for start in (projected, rows[model, "projected"]):
            assert better(pruned["value"], start["value"]) == start["value"] != pruned["value"]
        assert not hasattr(ff.from_pretrained(out / model / "projected-tuned").config, "ffmerge")
    assert rows["gpt2-stdlib", "projected + tuned"]["value"] < rows["gpt2-stdlib", "pruned + tuned"]["value"]
    assert rows["gpt2-stdlib", "permuted + refit"]["value"] < rows["gpt2-stdlib", "permuted"]["value"]
    assert rows["gpt2-stdlib", "permuted"]["value"] < rows["gpt2-stdlib", "averaged"]["value"]
    assert (out / "correlation.png").stat().st_size > 10_000
    assert "permuted + refit + tuned" in (out / "report.md").read_text()


def test_demo_refuses_a_folder_that_is_not_its_own(capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", str(tmp_path)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"
