"""The command line: every verb on a tiny model, and one clear line for every mistake."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffmerge_fast as ff
from ffmerge_fast.cli.main import main
from ffmerge_fast.cli.parser import command_names
from ffmerge_fast.models import families
from ffmerge_fast.ops.correlation import products
from ffmerge_fast.runtime.streaming import source
from tests.helpers.tiny_models import tiny_model

pytest.importorskip("transformers")
WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 with a tokenizer, as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_model("gpt2", layers=5).save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """200 blocks of words in no order."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    ids = torch.randint(0, 60, (200 * 32,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(WORDS[i] for i in ids.tolist()))
    return path


@pytest.fixture(scope="module")
def statistics(folder, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    assert main(["collect", str(folder), str(path), "--window", "3", *_data(text), "--tokens", "500", "-q"]) == 0
    return path


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def _data(text) -> list[str]:
    return ["--data", str(text), "--max-length", "32"]


def run(capsys, *argv) -> dict:
    """The JSON a command prints."""
    status = main([*map(str, argv), "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def refuse(capsys, *argv) -> str:
    """The one line a command ends with when it exits with 1."""
    assert main([str(a) for a in argv]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    lines = [line for line in captured.err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


def misuse(capsys, *argv) -> str:
    """The one line of a usage error."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and not captured.out and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_inspect(capsys, folder):
    values = run(capsys, "inspect", folder)
    model = tiny_model("gpt2", layers=5)
    assert values["parameters"] == sum(p.numel() for p in model.parameters())
    assert [f["index"] for f in values["ffns"]] == [0, 1, 2, 3, 4]
    assert values["ffn_parameters"] == sum(f.parameters for f in ff.find_ffns(model))
    assert main(["inspect", str(folder)]) == 0
    assert "transformer.h.4" in capsys.readouterr().out


def test_collect_plan_merge_verify_expand_eval(capsys, folder, text, statistics, tmp_path):
    stats = ff.CorrelationStats.load(statistics)
    assert stats.tokens == {"decoder": 500}
    plan = run(capsys, "plan", statistics, "--layers", "1-3", "--anchor", "middle", "--out", tmp_path / "plan.json")
    assert plan["layers"] == "1-3" and plan["parameters_after"] < plan["parameters"]

    merged = run(capsys, "merge", folder, tmp_path / "merged", "--plan", tmp_path / "plan.json")
    expected = ff.merge(ff.from_pretrained(folder), ff.plan(stats, "1-3", anchor="middle"))
    found = ff.from_pretrained(tmp_path / "merged")
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, found.get_parameter(name)), name
    tensors = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert sum(t.numel() for t in tensors) == merged["parameters_after"]
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert (tmp_path / "merged" / "_ffmerge" / "plan.json").exists()

    assert run(capsys, "verify", tmp_path / "merged")["logit_difference"] == 0.0
    run(capsys, "export", tmp_path / "merged", tmp_path / "stock", "--expand")
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["model_type"] == "gpt2"
    small, full = (run(capsys, "eval", tmp_path / f, *_data(text), "--eval-limit", 20) for f in ("merged", "stock"))
    assert small == full and small["perplexity"] > 1


@pytest.mark.parametrize("place", ["disk", "host"])
def test_eval_of_streamed_weights(capsys, folder, text, monkeypatch, place):
    loaded, load = [], source.Source.load
    monkeypatch.setattr(source.Source, "load", lambda *args: loaded.append(args[1]) or load(*args))
    options = ("eval", folder, *_data(text), "--eval-limit", 8)
    wanted = run(capsys, *options)
    assert not loaded
    line = refuse(capsys, *options, "--stream", place, "--stream-budget", 1)
    least, double = (int(found.replace(",", "")) for found in re.findall(r"([\d,]{4,})(?=: | to load)", line))
    assert line.startswith("error: budget: got 1 bytes, wanted at least ") and not loaded
    for budget in (least, double):
        assert run(capsys, *options, "--stream", place, "--stream-budget", budget) == wanted and loaded
        loaded.clear()
    assert run(capsys, *options, "--stream", place) == wanted and not loaded  # all fits 20GiB


def test_bad_stream_options(capsys, folder, text):
    options = ("eval", folder, *_data(text), "--eval-limit", 8)
    assert "it needs --stream disk or --stream host" in refuse(capsys, *options, "--stream-budget", "1GB")
    line = misuse(capsys, *options, "--stream", "host", "--stream-budget", "much")
    assert "--stream-budget: got 'much', wanted a number of bytes" in line
    assert "device: got 'tpu', wanted 'cpu'" in refuse(capsys, *options, "--stream", "host", "--device", "tpu")
    assert "invalid choice: 'tape'" in misuse(capsys, *options, "--stream", "tape")


def test_merge_collects_by_itself(capsys, folder, text, tmp_path):
    options = (*_data(text), "--tokens", 300, "--seed", 3)
    values = run(capsys, "merge", folder, tmp_path / "a", "--layers", "0-1,3-4", *options)
    assert values["layers"] == "0-1,3-4"
    again = run(capsys, "merge", folder, tmp_path / "b", "--window", 2, *options)
    assert len(again["search"]) == 4 and again["layers"] == max(again["search"], key=lambda s: s["score"])["layers"]
    without_data = run(capsys, "merge", folder, tmp_path / "c", "--layers", "0+2+4", "--method", "average")
    assert without_data["layers"] == "0+2+4"


def test_sweep_writes_csv(capsys, statistics, tmp_path):
    values = run(capsys, "plan", statistics, "--sweep", "2,3", "--csv", tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["layers"] for r in rows] == ["0-1", "1-2", "2-3", "3-4", "0-2", "1-3", "2-4"]
    assert [float(r["mean_correlation"]) for r in rows] == [r["mean_correlation"] for r in values["sweep"]]


def test_search_keeps_scores_and_resumes(capsys, folder, text, statistics, tmp_path):
    argv = ("search", folder, "--statistics", statistics, "--window", 2, *_data(text), "--eval-limit", 8)
    first = run(capsys, *argv, "--resume", tmp_path / "scores.json", "--out", tmp_path / "plan.json")
    assert first["metric"] == "perplexity" and len(first["search"]) == 4
    assert first["layers"] == min(first["search"], key=lambda s: s["score"])["layers"]
    kept = json.loads((tmp_path / "scores.json").read_text())
    kept["scores"]["0-1"] = 0.5  # a resumed search believes the file
    del kept["checksum"]  # as of an earlier version
    (tmp_path / "scores.json").write_text(json.dumps(kept))
    assert run(capsys, *argv, "--resume", tmp_path / "scores.json")["layers"] == "0-1"


def test_search_by_proxy_evaluates_no_model(capsys, folder, text, statistics, tmp_path):
    argv = ("search", folder, "--statistics", statistics, "--window", 2, *_data(text), "--batch-size", 4)
    found = run(capsys, *argv, "--evaluate", "proxy", "--proxy-tokens", 400, "--out", tmp_path / "plan.json")
    assert found["metric"] == "relative error" and len({s["score"] for s in found["search"]}) == 4
    assert found["layers"] == min(found["search"], key=lambda s: s["score"])["layers"]
    merged = run(capsys, "merge", folder, tmp_path / "merged", "--plan", tmp_path / "plan.json")
    assert merged["layers"] == found["layers"]
    assert "resume" in refuse(capsys, *argv, "--evaluate", "proxy", "--resume", tmp_path / "scores.json")


def test_merge_with_refit_keeps_its_report(capsys, folder, text, tmp_path):
    plain = ("merge", folder, tmp_path / "plain", "--layers", "1-3", "--method", "average")
    run(capsys, *plain)
    refit = ("--recover", "refit", "--ridge", 0.1, *_data(text), "--tokens", 800, "--batch-size", 4)
    values = run(capsys, *plain[:2], tmp_path / "refit", *plain[3:], *refit, "--recover-rounds", 2)
    found = values["refit"]
    assert len(found["scores"]) == 4 and found["scores"][found["best"]] == min(found["scores"])
    assert found["groups"][0]["layers"] == [1, 2, 3] and found["groups"][0]["after"] < found["groups"][0]["before"]
    assert json.loads((tmp_path / "refit" / "_ffmerge" / "refit.json").read_text()) == found
    before, after = (ff.from_pretrained(tmp_path / name) for name in ("plain", "refit"))
    assert ff.shared_groups(after) == [("decoder", (1, 2, 3))]
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    wanted = {f"transformer.h.1.mlp.c_proj.{name}" for name in ("weight", "bias")} if found["best"] else set()
    assert moved == wanted
    assert "--data" in refuse(capsys, *plain[:2], tmp_path / "none", *plain[3:], "--recover", "refit")


def test_merge_with_refit_and_distillation(capsys, folder, text, tmp_path):
    options = ("--layers", "1-3", "--method", "average", *_data(text), "--tokens", 800, "--batch-size", 4)
    out = tmp_path / "merged"
    values = run(capsys, "merge", folder, out, *options, "--recover", "refit+distill", "--recover-steps", 30)
    refit, distill = (values[name]["groups"][0] for name in ("refit", "distill"))
    assert refit["layers"] == distill["layers"] == [1, 2, 3] and distill["best"] > 0
    assert distill["after"] < distill["before"] < refit["before"] and {"refit", "distill"} <= set(values["seconds"])
    for name in ("refit", "distill"):
        assert json.loads((out / "_ffmerge" / f"{name}.json").read_text()) == values[name]
    assert ff.shared_groups(ff.from_pretrained(out)) == [("decoder", (1, 2, 3))]
    wrong = misuse(capsys, "merge", folder, tmp_path / "none", *options, "--recover", "distill", "--recover-lr", -1)
    assert "lr: got '-1', wanted a number, more than 0" in wrong and not (tmp_path / "none").exists()


def test_merge_with_deltas(capsys, folder, text, tmp_path):
    options = ("--layers", "1-3", "--method", "average", *_data(text), "--tokens", 800, "--batch-size", 4)
    distill = ("--recover", "distill", "--recover-steps", 20)
    run(capsys, "merge", folder, tmp_path / "plain", *options, *distill)
    values = run(capsys, "merge", folder, tmp_path / "deltas", *options, *distill, "--delta-rank", 2)
    group = values["distill"]["groups"][0]
    plain, model = (ff.from_pretrained(tmp_path / name) for name in ("plain", "deltas"))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (plain, model)]
    assert group["delta_rank"] == 2 and sizes[1] - sizes[0] == group["delta_parameters"] > 0
    assert ff.shared_groups(model) == [("decoder", (1, 2, 3))]
    assert "delta parameters" in (tmp_path / "deltas" / "_ffmerge" / "distill.txt").read_text()
    assert run(capsys, "verify", tmp_path / "deltas")["groups"][0]["delta_rank"] == 2
    inspected = [run(capsys, "inspect", tmp_path / name) for name in ("plain", "deltas")]
    assert inspected[1]["shared_groups"] == [{"stack": "decoder", "layers": [1, 2, 3]}]
    assert inspected[1]["ffn_parameters"] - inspected[0]["ffn_parameters"] == group["delta_parameters"]
    run(capsys, "export", tmp_path / "deltas", tmp_path / "full", "--expand")
    assert type(ff.from_pretrained(tmp_path / "full")).__name__ == "GPT2LMHeadModel"
    for wrong, message in (
        (("--delta-rank", 2), "--delta-rank: does nothing here, it needs --recover distill"),
        ((*distill, "--delta-rank", 17), "delta_rank: got 17, wanted 0 (none) to 16"),
    ):
        assert message in refuse(capsys, "merge", folder, tmp_path / "none", *options, *wrong)
    assert not (tmp_path / "none").exists()


def test_merge_with_neurons(capsys, folder, text, tmp_path):
    options = ("--layers", "1-3", "--method", "average", *_data(text), "--tokens", 800, "--batch-size", 4)
    both = ("--recover", "refit+distill", "--recover-steps", 5, "--private", 3)
    values = run(capsys, "merge", folder, tmp_path / "own", *options, *both)
    (group,) = values["refit"]["groups"]
    assert group["private_neurons"] == 3 and group["private_parameters"] > 0 and "distill" in values
    assert run(capsys, "verify", tmp_path / "own")["groups"][0]["private_neurons"] == 3
    assert run(capsys, "inspect", tmp_path / "own")["shared_groups"] == [{"stack": "decoder", "layers": [1, 2, 3]}]
    run(capsys, "export", tmp_path / "own", tmp_path / "full", "--expand")
    assert type(ff.from_pretrained(tmp_path / "full")).__name__ == "GPT2LMHeadModel"
    for wrong, message in (
        (("--private", 2), "--private: does nothing here, it needs --recover refit"),
        ((*both, "--delta-rank", 2), "--delta-rank: does nothing here, it needs no --private"),
    ):
        assert message in refuse(capsys, "merge", folder, tmp_path / "none", *options, *wrong)
    assert not (tmp_path / "none").exists()


def test_finetune_keeps_the_tie(capsys, folder, text, tmp_path):
    run(capsys, "merge", folder, tmp_path / "merged", "--layers", "1-3", "--method", "average")
    options = ("--steps", 6, "--lr", 1e-2, "--batch-size", 4, "--eval-every", 3, "--save-every", 3, "--eval-limit", 8)
    values = run(capsys, "finetune", tmp_path / "merged", tmp_path / "tuned", *_data(text), *options)
    assert values["steps"] == 6 and values["metric"] == "perplexity"
    before, after = (ff.from_pretrained(tmp_path / name) for name in ("merged", "tuned"))
    assert ff.shared_groups(after) == [("decoder", (1, 2, 3))]
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert "transformer.h.1.mlp.c_fc.weight" in moved
    assert run(capsys, "verify", tmp_path / "tuned")["logit_difference"] == 0.0


_PROJECT = ("--lr", 1e-2, "--batch-size", 4, "--eval-limit", 8, "--attention", "head_dim", "--calibration", 2)


def test_project_writes_a_stock_folder(capsys, folder, text, tmp_path):
    options = (*_data(text), *_PROJECT, "--keep", 0.5, "--distill", "--share", "qkv", "--init", "svd")
    values = run(capsys, "project", folder, tmp_path / "small", *options, "--steps", 6, "--eval-every", 3)
    assert values["steps"] == 6 and values["metric"] == "perplexity"
    assert 0.3 < values["parameters_after"] / values["parameters"] < 0.7
    small = ff.from_pretrained(tmp_path / "small")
    assert type(small).__name__ == "GPT2LMHeadModel" and small.config.n_embd < 16
    assert sum(p.numel() for p in small.parameters()) == values["parameters_after"]
    assert run(capsys, "verify", tmp_path / "small")["logit_difference"] == 0.0
    assert run(capsys, "eval", tmp_path / "small", *_data(text), "--eval-limit", 8)["perplexity"] > 1


def test_merge_then_project(capsys, folder, text, tmp_path):
    """Both methods by the command line: the result is merged, smaller, and verified as any merged folder."""
    run(capsys, "merge", folder, tmp_path / "merged", "--layers", "1-3", "--method", "average")
    options = (*_data(text), *_PROJECT, "--d-model", 8, "--d-ff", 12, "--steps", 2)
    run(capsys, "project", tmp_path / "merged", tmp_path / "both", *options)
    run(capsys, "fold", tmp_path / "merged", tmp_path / "both.project", tmp_path / "folded")
    merged, both = ff.from_pretrained(tmp_path / "merged"), ff.from_pretrained(tmp_path / "both")
    assert ff.shared_groups(both) == ff.shared_groups(merged) == [("decoder", (1, 2, 3))]
    assert both.transformer.h[1].mlp is both.transformer.h[3].mlp and both.config.n_embd == 8
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("merged", "both", "folded")}
    assert sizes["both"] == sizes["folded"] < sizes["merged"]
    stored = load_file(tmp_path / "both" / "model.safetensors")
    assert [name for name in stored if ".mlp.c_fc.weight" in name] == [
        f"transformer.h.{i}.mlp.c_fc.weight" for i in (0, 1, 4)
    ]
    for name in ("both", "folded"):
        assert run(capsys, "verify", tmp_path / name)["logit_difference"] == 0.0
    damaged = {name: t.clone() for name, t in stored.items()}
    damaged["transformer.h.1.mlp.c_fc.weight"][0, 0] += 1
    save_file(damaged, tmp_path / "both" / "model.safetensors", metadata={"format": "pt"})
    assert "its checksum differs" in refuse(capsys, "verify", tmp_path / "both")


def test_project_goes_on_and_folds(capsys, folder, text, tmp_path):
    options = (*_data(text), *_PROJECT, "--d-model", 8, "--d-ff", 12, "--schedule", "constant", "--eval-every", 2)
    whole = run(capsys, "project", folder, tmp_path / "whole", *options, "--steps", 4)
    run(capsys, "project", folder, tmp_path / "half", *options, "--steps", 2, "--work-dir", tmp_path / "work")
    kept = (tmp_path / "work" / "importance.safetensors").stat().st_mtime_ns
    work = ("--work-dir", tmp_path / "work")
    resumed = run(capsys, "project", folder, tmp_path / "resumed", *options, "--steps", 4, *work)
    assert (tmp_path / "work" / "importance.safetensors").stat().st_mtime_ns == kept
    assert resumed["best"] == whole["best"]
    run(capsys, "fold", folder, tmp_path / "work", tmp_path / "folded")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed", "folded")]
    for name, tensor in files[0].items():
        assert torch.equal(tensor, files[1][name]) and torch.equal(tensor, files[2][name]), name
    changed = (*options, "--steps", 4, "--no-residual", *work)
    assert "other residual: True there" in refuse(capsys, "project", folder, tmp_path / "x", *changed)
    assert "projection.json" in refuse(capsys, "fold", folder, tmp_path, tmp_path / "y")
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either keep="),
        (("--d-model", 32), "d_model: got 32"),
        (("--keep", 0.5, "--distill", "--teacher", "x"), "--teacher: does nothing here, it needs no --distill"),
        (("--keep", 0.5, "--importance", "missing"), "importance: missing is not a file"),
        (("--keep", 0.5, "--parallel", "tensor"), None),
    ],
)
def test_bad_projections(capsys, folder, text, tmp_path, options, message):
    argv = ("project", folder, tmp_path / "out", *_data(text), "--steps", 2, *options)
    if message is None:
        with pytest.raises(SystemExit):
            main([str(a) for a in argv])
    else:
        assert message in refuse(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_env(capsys):
    assert "torch" in json.dumps(run(capsys, "env"))


def test_unknown_family_by_four_paths(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.delitem(families._FAMILIES, "gpt2")
    assert "--ffn-up" in refuse(capsys, "inspect", folder)
    paths = ("--ffn-layers", "h", "--ffn-up", "mlp.c_fc", "--ffn-down", "mlp.c_proj")
    assert len(run(capsys, "inspect", folder, *paths)["ffns"]) == 5
    assert "--ffn-down" in refuse(capsys, "inspect", folder, "--ffn-up", "mlp.c_fc")


@pytest.mark.parametrize("layers", ["22-", "9-3", "a", "0-1,1-2", "0", "3-9", "encoder:0-1", ""])
def test_bad_layers(capsys, folder, statistics, tmp_path, layers):
    assert "layers" in refuse(capsys, "plan", statistics, "--layers", layers)
    assert "layers" in refuse(capsys, "merge", folder, tmp_path / "m", "--statistics", statistics, "--layers", layers)
    assert not (tmp_path / "m").exists()


def test_bad_folders(capsys, folder, tmp_path):
    assert "not a folder" in refuse(capsys, "inspect", tmp_path / "missing")
    assert "--online" in refuse(capsys, "inspect", "somebody/model")
    (tmp_path / "empty").mkdir()
    assert "no weights" in refuse(capsys, "inspect", tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    average = ("--layers", "0-1", "--method", "average")
    assert "is a file" in refuse(capsys, "merge", folder, tmp_path / "file", *average)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    assert "--overwrite" in refuse(capsys, "merge", folder, tmp_path / "full", *average)
    assert (tmp_path / "full" / "kept.txt").read_text() == "mine"
    assert "holds kept.txt" in refuse(capsys, "merge", folder, tmp_path / "full", *average, "--overwrite")
    assert (tmp_path / "full" / "kept.txt").read_text() == "mine"
    (tmp_path / "full" / "kept.txt").unlink()
    for _ in range(2):
        run(capsys, "merge", folder, tmp_path / "full", *average, "--overwrite")
    assert "merged already" in refuse(capsys, "merge", tmp_path / "full", tmp_path / "twice", *average)


def test_bad_data(capsys, folder, statistics, tmp_path):
    assert "--data" in refuse(capsys, "merge", folder, tmp_path / "m", "--layers", "0-1")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert refuse(capsys, "merge", folder, tmp_path / "m", "--layers", "0-1", "--data", empty)
    assert refuse(capsys, "eval", folder, "--data", tmp_path / "missing.txt")
    assert "larger window" in refuse(capsys, "plan", statistics, "--layers", "0-4")
    assert "window" in refuse(capsys, "plan", statistics, "--window", "9")
    assert "exactly one" in refuse(capsys, "plan", statistics)
    assert "statistics" in refuse(capsys, "plan", tmp_path / "missing")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("command", ["collect", "merge", "search", "plan"])
def test_max_memory_spools_and_changes_nothing(capsys, folder, text, statistics, tmp_path, monkeypatch, command):
    spooled, spool = [], products.SpooledAccumulators
    monkeypatch.setattr(products, "SpooledAccumulators", lambda packing: spooled.append(packing) or spool(packing))
    data = ("--window", 3, *_data(text), "--tokens", 500)
    arguments = {
        "collect": lambda out: ("collect", folder, out, *data),
        "merge": lambda out: ("merge", folder, out, *data),
        "search": lambda out: ("search", folder, "--out", out, "--eval-limit", 4, *data),
        "plan": lambda out: ("plan", statistics, "--window", 3, "--out", out),
    }[command]
    one_pair = 4 * ff.CorrelationStats.load(statistics).model.ffns[0].d_ff ** 2
    run(capsys, *arguments(tmp_path / "free"))
    assert not spooled
    run(capsys, *arguments(tmp_path / "tight"), "--max-memory", f"{2 * one_pair / 1024}KiB")
    assert spooled
    free, tight = (tmp_path / name for name in ("free", "tight"))
    if command in ("plan", "search"):
        assert free.read_text() == tight.read_text()
    else:
        a, b = (load_file(path / "model.safetensors" if command == "merge" else path) for path in (free, tight))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_bad_max_memory(capsys, folder, text, tmp_path):
    collect = ("collect", folder, tmp_path / "s", "--window", 3, *_data(text), "--max-memory")
    assert "--max-memory: got 'much', wanted a number of bytes" in misuse(capsys, *collect, "much")
    line = refuse(capsys, *collect, "7")
    assert line.startswith("error: max_memory: ") and "one pair take" in line
    assert not (tmp_path / "s").exists()


def test_too_little_memory_names_bytes_and_the_option(capsys, folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "free_memory", lambda device: 100)
    line = refuse(capsys, "collect", folder, tmp_path / "s", "--window", 3, "--exact", *_data(text))
    needed = int(re.search(r"[(](\d+) bytes[)]", line)[1])
    d_ff = ff.find_ffns(tiny_model("gpt2", layers=5))[0].d_ff
    assert needed >= 7 * 4 * d_ff**2 and re.search(r"--max-memory \d+MiB", line)


def test_sketches_and_exact_correlations(capsys, folder, text, statistics, tmp_path):
    common = ("collect", folder, tmp_path / "s", "--window", 3, *_data(text))
    assert run(capsys, *common)["sketch"] == 1024  # 6,400 tokens
    assert run(capsys, *common, "--tokens", 2000)["sketch"] is None  # fewer than two for each row
    assert run(capsys, *common, "--exact")["sketch_error"] == 0
    found = run(capsys, *common, "--sketch", 256)
    assert found["sketch"] == 256 and found["sketch_error"] == 1 / 16
    plan = run(capsys, "plan", tmp_path / "s", "--layers", "0-4", "--out", tmp_path / "p")  # no window of 3
    assert plan["sketched"]["rows"] == 256 and plan["sketched"]["expected_loss"] < 1
    run(capsys, "merge", folder, tmp_path / "merged", "--plan", tmp_path / "p")
    assert "no correlation" in refuse(capsys, "plan", statistics, "--layers", "0-4")
    assert "fewer rows than tokens" in refuse(capsys, *common, "--tokens", 100, "--sketch", 200)
    for options in (("--sketch", "8"), ("--sketch", "64", "--exact")):
        assert "--sketch" in misuse(capsys, *map(str, common), *options)
    line = refuse(capsys, "merge", folder, tmp_path / "m", "--statistics", statistics, "--layers", "0-1", "--exact")
    assert "--exact: does nothing here" in line


def test_statistics_of_another_model(capsys, statistics, tmp_path):
    tiny_model("gpt2", layers=5, seed=1).save_pretrained(tmp_path / "other")
    line = refuse(capsys, "merge", tmp_path / "other", tmp_path / "m", "--statistics", statistics, "--layers", "0-1")
    assert "another model" in line


def test_usage_errors_exit_with_2(capsys):
    for argv in (["nonsense"], ["merge"], ["plan", "x", "--anchor", "best"], []):
        assert misuse(capsys, *argv).startswith("error: ")


def test_every_command_knows_the_common_options(capsys):
    for name in command_names():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        for option in ("--json", "--verbose", "--quiet", "--seed", "--device", "--dtype"):
            assert re.search(rf"{option}\b", text), (name, option)


def test_several_files_are_read_and_never_their_names(capsys, folder, text, tmp_path):
    words = text.read_text().split()
    for name, part in (("part 1.txt", words[:500]), ("part 2.txt", words[500:1000])):
        (tmp_path / name).write_text(" ".join(part))
    paths = sorted(tmp_path.glob("*.txt"))
    options = ("eval", folder, "--max-length", 32, "--data")
    tokens = run(capsys, *options, *paths)["tokens"]
    assert tokens == 1001 - 32  # both, the end token between them; of each window the first is not scored
    (tmp_path / "a.csv").write_text("title,body\n" + "w1 w2,w3 w4\n" * 40)
    assert run(capsys, *options, tmp_path / "a.csv", "--text-column", "body")["tokens"] == 40 * 3 - 1 - 4
    for more, words in (
        ([*paths, tmp_path / "none.txt"], "none.txt does not exist"),
        ([tmp_path / "a.csv"], "several columns with text (title, body); name one by --text-column"),
        ([paths[0], "--text-column", "body"], "part 1.txt has no columns"),
        ([paths[0], "--target-lang", "de"], "--target-lang (languages=): is for translation"),
        ([paths[0], "--task", "masked"], "give --task lm"),
    ):
        assert words in refuse(capsys, *options, *more)
