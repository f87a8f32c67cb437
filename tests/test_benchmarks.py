"""The timing harness: wrong results get no time, candidates take turns, results of other cases are kept."""

from __future__ import annotations

import argparse
import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.harness import cuda_graphs, measure, registry, render
from benchmarks.ops import Case, Job
from benchmarks.ops.assignment import assignment_case
from benchmarks.ops.correlation import correlation_case
from benchmarks.ops.projection import projection_case
from benchmarks.ops.shared_ffn import FFN_SHAPES, shared_ffn_layers_case
from benchmarks.studies import pipeline, projection_quality, projection_step, quality, recovery, search_proxy, stream
from tests.helpers.triton_tools import needs_triton

ROOT = Path(__file__).resolve().parents[1]


def test_wrong_result_is_never_timed():
    calls = []
    candidates = {"ffmerge": lambda: calls.append("ffmerge") or 0.0, "peer": lambda: calls.append("peer") or 1.0}
    with pytest.raises(measure.RedGate, match="peer 1.00e\\+00"):
        measure.compare(candidates, error=abs, limit=0.5)
    assert calls == ["ffmerge", "peer"]  # once each, for the check


def test_nan_is_a_wrong_result():
    with pytest.raises(measure.RedGate, match="ffmerge nan"):
        measure.compare({"ffmerge": lambda: math.nan}, error=abs, limit=0.5)


def test_candidates_take_turns():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = measure.compare(candidates, error=lambda _: 0.0, limit=0.0, runs=4)
    assert calls == list("abc") * 5
    assert {name: t.runs for name, t in timings.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(t.fastest <= t.median <= t.slowest for t in timings.values())


def test_time_limit_leaves_three_runs():
    timings = measure.compare({"ffmerge": lambda: None}, error=lambda _: 0.0, limit=0.0, runs=50, max_seconds=0)
    assert timings["ffmerge"].runs == 3


@pytest.mark.parametrize("name", ["torch dense", "published loop"])
def test_correlation_peers_do_the_same_work(name):
    job = correlation_case("small", layers=3, batches=2, tokens=100, width=64, dtype=torch.float32).build("cpu")
    result = job.candidates[name]()
    assert set(result) == {(0, 1), (1, 2)} and job.error(result) <= job.limit
    assert result[0, 1].diagonal().mean() > 0.3  # the layers share directions
    result[0, 1][3, 5] += 1e-3
    assert job.error(result) > job.limit


def test_assignment_error_sees_a_worse_and_an_invalid_permutation():
    job = assignment_case("small", "related", 64).build("cpu")
    best = job.candidates["scipy"]()
    assert job.error(best) == 0
    assert job.error(best.roll(1)) > job.limit
    assert job.error(torch.zeros_like(best)) == math.inf


def small_setting(batches=2):
    return projection_step.Setting.random(64, 128, (32, 64), batches, 16, torch.float32)


@pytest.mark.parametrize("side", projection_step.SIDES)
def test_training_steps_do_the_same_work(side):
    gate = projection_step.Gate(small_setting())
    done = projection_step.SIDES[side](small_setting()).step()
    assert gate(done) <= 1e-4
    with torch.no_grad():
        parts = done.parts[0] if hasattr(done, "parts") else [*done.model.parameters()]
        parts[-1][3, 5] += 1e-3
    assert gate(done) > 1e-4


def test_extra_memory_of_a_plain_step_is_its_gradients_and_activations():
    setting = small_setting(batches=1)
    held = projection_step.extra_memory(setting)
    gradients = 4 * 2 * 32 * 64
    activations = 4 * 16 * (3 * 64 + 2 * 32)  # before and after gelu, its gradient; output and input's gradient
    assert gradients <= held[projection_step.PLAIN] <= gradients + activations + 4096
    assert held["autograd"] > held["ffmerge"] > 0


def test_projection_error_sees_a_wrong_gradient():
    job = projection_case("small", (64, 32), (32, 16), torch.float32).build("cpu")
    for name, run_once in job.candidates.items():
        result = run_once()
        assert job.error(result) <= job.limit, name
    result[2][3, 5] += 1.0
    assert job.error(result) > job.limit


def test_calls_in_a_row_return_the_last_result():
    seen = []
    assert cuda_graphs.calls(lambda: seen.append(0) or len(seen), 3, "cpu")() == 3


def test_tied_layers_do_the_same_work(monkeypatch):
    monkeypatch.setitem(FFN_SHAPES, "tiny", (16, 32, "silu", True))
    monkeypatch.setattr(cuda_graphs, "compiled", lambda function, device: function)
    job = shared_ffn_layers_case("large", "tiny", 3, torch.bfloat16, layers=2).build("cpu")
    assert list(job.candidates) == ["ffmerge", "torch", "torch.compile"]
    results = measure.check(job.candidates, job.error, job.limit)
    assert max(results.values()) > 0
    wrong = job.candidates["ffmerge"]() * 1.1
    assert job.error(wrong) > job.limit


def test_run_writes_a_table_and_keeps_other_cases(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(registry, "CASES", [assignment_case("small", "noise", 16)])
    threads = torch.get_num_threads()
    output = tmp_path / "results.csv"
    try:
        assert run.main(["--runs", "3", "--output", str(output)]) == 0
        monkeypatch.setattr(registry, "CASES", [assignment_case("small", kind, 16) for kind in ("noise", "dead")])
        assert run.main(["--runs", "3", "--output", str(output)]) == 0
    finally:
        torch.set_num_threads(threads)
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["candidate"]) for r in rows] == [
        (f"{kind} d16", candidate) for kind in ("noise", "dead") for candidate in ("ffmerge", "scipy")
    ]
    assert all(r["torch"] == torch.__version__ and float(r["median_ms"]) > 0 for r in rows)
    assert rows[0]["ratio"] == "1.00"
    assert "dead d16" in capsys.readouterr().out


def test_run_reports_red_and_fails(tmp_path, capsys, monkeypatch):
    job = Job({"ffmerge": lambda: 1.0}, error=abs, limit=0.1)
    monkeypatch.setattr(registry, "CASES", [Case("assignment", "wrong", "small", lambda device: job)])
    threads = torch.get_num_threads()
    try:
        assert run.main(["--output", str(tmp_path / "results.csv")]) == 1
    finally:
        torch.set_num_threads(threads)
    assert "RED assignment wrong" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_pipeline_compares_three_ways_to_the_same_merge(capsys, tmp_path):
    pytest.importorskip("transformers")
    arguments = "--layers 4 --width 64 --window 3 --tokens 300 --batch 2 --length 32 --sketch 256".split()
    path = tmp_path / "pipeline.csv"
    assert pipeline.main([*arguments, "--output", str(path)]) == 0
    with path.open(newline="", encoding="utf-8") as file:
        rows = {row["stage"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*pipeline.STAGES, "total", "of it forward", "total without forward"]
    for side in ("sketch s", "exact s", "published s"):
        stages, total, forward, rest = (
            [float(rows[name][side]) for name in names]
            for names in (pipeline.STAGES, ["total"], ["of it forward"], ["total without forward"])
        )
        assert sum(stages) == pytest.approx(total[0], abs=0.03)
        assert total[0] - forward[0] == pytest.approx(rest[0], abs=0.03) and forward[0] > 0
    lines = capsys.readouterr().out.splitlines()
    (shares,) = (line for line in lines if line.startswith("# share"))
    assert all(float(share.split()[-1]) > 0.2 for share in shares.split(","))
    assert any(line.startswith("# all windows of 3: 5 pairs; collect") for line in lines)


def test_pipeline_sides_leave_the_same_weights():
    pytest.importorskip("transformers")
    args = pipeline.parse("--layers 4 --width 64 --window 3 --tokens 300 --batch 2 --length 32".split())
    weights = []
    for side, options in ((pipeline.run_ffmerge, [None]), (pipeline.run_published, [])):
        model, batches = pipeline.build(args)
        side(model, batches, [0, 1, 2], args.tokens, *options)
        weights.append([model.transformer.h[i].mlp.c_fc.weight for i in range(4)])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@needs_triton
@pytest.mark.slow
def test_the_gpu_list_can_be_rehearsed(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--output", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "RED" not in done.stderr, done.stderr[-3000:]
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"correlation", "assignment", "shared_ffn", "projection"}
    assert all(float(row["of_copy"]) >= 0 for row in rows if "sketch" in row["case"])


class _Rows(quality.Run):
    """One variant of a model that is a list of what was done to it."""

    def __init__(self, done=()):
        self.args = argparse.Namespace(tune=3)
        self.done = {tuple(row[name] for name in quality.KEY): row for row in done}
        self.common = {"model": "m", "metric": "loss", "before": 0.1 + 0.2, "tokens": 10, "ridge": 0.01}
        self.common |= {"weights": "stream"}
        self.scored = []

    def tune(self, model):
        model.append("tuned")

    def score(self, model):
        self.scored.append(list(model))
        return len(model) / 3

    def all(self):
        values = {"layers": "0-1", "merged": "2/4", "method": "copy", "recover": "refit"}
        return list(self.variant(values, lambda: ["made"], lambda model: model.append("refit")))


def test_quality_makes_only_the_rows_that_the_file_lacks(tmp_path):
    first, path = _Rows(), tmp_path / "quality.csv"
    rows = first.all()
    assert first.scored == [["made", "refit"], ["made", "refit", "tuned"]]
    assert [(row["tuned_steps"], row["score"]) for row in rows] == [(0, 2 / 3), (3, 1.0)]
    quality.write(path, rows)
    again = _Rows(quality.read(path))
    assert again.all() == rows and again.scored == []
    quality.write(path, rows[:1])
    rest = _Rows(quality.read(path))
    assert [row["score"] for row in rest.all()] == [2 / 3, 1.0] and rest.scored == [["made", "refit", "tuned"]]
    other = _Rows([rows[0] | {"ridge": 0.1}, rows[1] | {"tuned_steps": 4}])
    other.all()
    assert other.scored == first.scored


@pytest.mark.parametrize("best", [1e-5, 3e-4, 1e-3, 3e-2])
def test_the_learning_rate_is_searched_until_the_best_is_inside(best):
    tried = {}

    def loss(lr):
        tried[lr] = abs(math.log(lr / best)) if lr < 10 * best else math.inf  # beyond that it diverges
        return tried[lr]

    assert projection_quality.best_rate(loss) == best
    assert min(tried) < best < max(tried)
    assert all(a in tried for a in projection_quality.RATES if min(tried) < a < max(tried))


def test_rows_of_a_stopped_run_are_not_made_again(tmp_path):
    def runs(results):
        made = projection_quality.Runs.__new__(projection_quality.Runs)
        made.name, made.case = (
            "tiny",
            projection_quality.Case(batch_size=2, calibration=1, validation=1, test=1),
        )
        made.keep, made.steps, made.path = 0.5, 3, tmp_path / "rows.csv"
        made.rows = projection_quality._read(made.path)
        made._train = lambda variant, lr, seed: dict.fromkeys(("start", "validation", "test"), results.pop())
        return made

    first = runs([2.0, 1.0])
    assert [first.validation("pruned", lr, 0) for lr in (1e-3, 3e-3, 1e-3)] == [1.0, 2.0, 1.0]
    again = runs([3.0])
    assert [again.validation("pruned", lr, 0) for lr in (3e-3, 1e-3)] == [2.0, 1.0]
    assert again.validation("pruned", 1e-3, seed=1) == 3.0
    assert len(projection_quality._read(first.path)) == 3


def test_search_proxy_ranks_windows_of_a_real_model(shared):
    rows = list(search_proxy.rows_of("gpt2-pystdlib", shared, [2], tokens=512, limit=16))
    assert [row["layers"] for row in rows] == [f"{i}-{i + 1}" for i in range(11)]
    assert all(set(row) == set(search_proxy.COLUMNS) and row["proxy"] > 0 for row in rows)
    loss, proxy = ([row[key] for row in rows] for key in ("loss", "proxy"))
    assert render.spearman(loss, proxy) > 0.3  # 0.79 on all data
    line = search_proxy.summary(rows).splitlines()[-1].split()
    assert line[:3] == ["gpt2-pystdlib", "2", "11"] and float(line[5]) == pytest.approx(min(loss), rel=1e-3)


def test_spearman_compares_orders_only():
    assert render.spearman([1, 2, 3, 4], [0.1, 5, 6, 100]) == pytest.approx(1)
    assert render.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert render.spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


def test_committed_tables_are_those_of_the_csvs():
    written = (render.RESULTS / "README.md").read_text(encoding="utf-8")
    assert written == render.page(), "run python -m benchmarks.harness.render"
    pictures = re.findall(r"!\[.*?\]\((\S+)\)", written)
    assert pictures and all((render.RESULTS / name).is_file() for name in pictures)


def test_pivot_has_a_column_per_value():
    rows = [{"a": "1.234", "b": "x", "c": "5"}, {"a": "2", "b": "y", "c": "6"}, {"a": "2", "b": "x", "c": ""}]
    table = render.pivot(("a:.1f",), "b", lambda row: row["c"])(rows)
    assert table == [["a", "x", "y"], ["1.2", "5", ""], ["2.0", "", "6"]]
    assert render.markdown(table).splitlines()[1:3] == ["| --- | --- | --- |", "| 1.2 | 5 |  |"]


def test_best_rate_is_that_of_the_first_seed():
    rows = [
        {"keep": "0.5", "steps": steps, "variant": "pruned", "seed": seed, "lr": lr, "validation": val, "test": test}
        for steps, seed, lr, val, test in (
            ("50", "0", "1", "2.5", "9"), ("50", "0", "3", "2.0", "1"), ("50", "1", "3", "8", "2"),
            ("0", "0", "0", "3", "4"),
        )
    ]  # fmt: skip
    table = render.at_best_rate(rows)
    assert table[1:] == [
        ["0.5", "0", "pruned", "0", "1", "4.000"], ["0.5", "50", "pruned", "3", "2", "1.500 ± 0.707"],
    ]  # fmt: skip


def test_recovery_compares_the_same_merged_model(shared, monkeypatch):
    monkeypatch.setitem(recovery.FEWER, "4-7", ("4-6",))
    run = recovery.Run("gpt2-pystdlib", shared, tokens=2048, steps=20, ranks=(4,), limit=16)
    rows = list(run.rows("4-7"))
    names = ["none", "refit", "distill", "distill, deltas of rank 4", "distill, 4-6 merged", "refit + distill", "tune"]
    assert [row["recovery"] for row in rows] == [*names, "refit + tune"]
    assert all(set(row) == set(recovery.COLUMNS) for row in rows)
    values = {row["recovery"]: row for row in rows}
    assert values["none"]["recovered"] == 0.0
    assert len({values[name]["loss"] for name in ("none", "refit", "tune", "refit + tune")}) == 4
    assert min(values["tune"]["steps"], values["refit + tune"]["steps"]) > 0
    for row in rows:
        assert row["recovered"] < 1 and (row["recovered"] > 0) == (row["loss"] < values["none"]["loss"])
    assert values["distill"]["steps"] == values["refit + distill"]["steps"] == 20
    d, d_ff = 128, 512
    deltas = 1 + 4 * (2 * 4 + 1) * (d + d_ff) / (2 * d * d_ff + d + d_ff)
    assert [row["ffns"] for row in rows] == [1, 1, 1, round(deltas, 2), 2, 1, 1, 1]
    assert values["distill, deltas of rank 4"]["loss"] < values["none"]["loss"]


@pytest.mark.parametrize("cache", [[], ["--keep-cache"]])
def test_streamed_steps_read_what_they_should(tmp_path, cache):
    pytest.importorskip("transformers")
    sizes = ["--layers", "4", "--width", "64", "--windows", "2", "--runs", "3"]
    assert stream.main([*sizes, *cache, "--output", str(tmp_path / "stream.csv")]) == 0
    untied, tied = csv.DictReader((tmp_path / "stream.csv").open())
    block, ffn = 12 * 64**2 + 13 * 64, 8 * 64**2 + 5 * 64
    assert float(untied["MB read"]) == pytest.approx(4 * 4 * block / 1e6, abs=0.05)
    assert float(tied["fewer bytes"]) == pytest.approx(4 * block / (4 * block - ffn), abs=0.005)
