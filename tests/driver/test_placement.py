"""How a model is held: chosen by what it takes, within a budget, and said before any weight is read."""

from __future__ import annotations

import json
import re

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.checkpoint.on_disk import open_on_disk
from ffmerge_fast.cli.main import main
from ffmerge_fast.driver.placement import Machine, ModelSize, Work, place
from ffmerge_fast.runtime.streaming.plan import Steps
from tests.helpers.tiny_models import tiny_model

pytest.importorskip("accelerate")
SIZE = ModelSize(parameters=500, nbytes=1000, layers=4, least=200, smooth=300, average=90, token=1)
GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.helpers.training import tiny_tokenizer

    folder = tmp_path_factory.mktemp("placement")
    model = tiny_model("llama", layers=6).to(torch.bfloat16)
    model.resize_token_embeddings(258)
    ff.save_pretrained(model, folder / "model", tiny_tokenizer(folder / "tokenizer"))
    (folder / "text.txt").write_text("a b b a a a b " * 400)
    return folder


def machine(device="cpu", memory=GB, host=GB, devices=0):
    return Machine(device, memory, host, devices)


@pytest.mark.parametrize(
    ("on", "options", "way", "weights"),
    [
        (machine(), {}, "whole", "host"),
        (machine(memory=900, host=900), {}, "stream", "disk"),
        (machine(), {"budget": 600}, "stream", "disk"),
        (machine(), {"host_memory": 600}, "stream", "disk"),
        (machine(memory=600, host=600), {"wanted": "cpu"}, "whole", "host"),
        (machine("cuda", 2000), {}, "whole", "host"),
        (machine("cuda", 800, devices=1600), {}, "spread", "host"),
        (machine("cuda", 800, devices=800), {}, "stream", "host"),
        (machine("cuda", 800, host=500, devices=800), {}, "stream", "disk"),
        (machine("cuda", 800, devices=1600), {"budget": 800}, "stream", "host"),
        (machine(), {"wanted": "stream"}, "stream", "disk"),
    ],
)
def test_the_way_follows_from_what_there_is(on, options, way, weights):
    found = place(SIZE, Work(sums=50, tokens=100, length=10, batch_size=2), on, **options)
    assert (found.way, found.weights) == (way, weights)
    room = options.get("budget") or options.get("host_memory") or on.device_memory
    assert found.way == "spread" or "wanted" in options or found.on_device <= room
    assert found.values()["bytes"] == 1000 and "500 parameters" in str(found)


def test_the_smallest_budget_is_named_and_does():
    work = Work(sums=50, tokens=100, length=10, batch_size=2)
    with pytest.raises(ff.FFMergeError, match="budget: 150 B may be used .* at least 270 bytes: 200 B for the largest"):
        place(SIZE, work, machine(), budget=150)
    assert place(SIZE, work, machine(), budget=270).budget == 200
    with pytest.raises(ff.FFMergeError, match="budget: 500 B may be used and all weights are to be on cpu"):
        place(SIZE, work, machine(), wanted="cpu", budget=500)


def test_the_size_of_a_model_on_disk_is_that_in_memory(folder):
    model, on_disk = ff.from_pretrained(folder / "model"), open_on_disk(folder / "model")
    size = ModelSize.of(model)
    assert size == ModelSize.of(on_disk) and size.least == Steps.of(model).least(ahead=False)
    assert size.nbytes >= sum(weight.nbytes for weight in model.parameters())


def run(way: str, words: list[str], capsys) -> None:
    """A command with its model whole, or with the least budget that it says it can do with: one block at a time."""
    place = ["--place", way]
    if way == "stream":
        assert main([*words, *place, "--budget", "1kB"]) == 1
        place += ["--budget", re.search("at least ([0-9]+) bytes", capsys.readouterr().err)[1]]
    assert main([*words, *place]) == 0


def data(folder):
    return ["--data", str(folder / "text.txt"), "--max-length", "16", "--batch-size", "2", "--tokens", "400", "-q"]


@pytest.mark.parametrize("kind", [["--layers", "1-3", "--exact"], ["--window", "3", "--sketch", "32"]])
def test_statistics_are_those_of_the_whole_model(folder, tmp_path, kind, capsys):
    for way in ("cpu", "stream"):
        run(way, ["collect", str(folder / "model"), str(tmp_path / way), *kind, *data(folder)], capsys)
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "stream").read_bytes()


@pytest.mark.parametrize("evaluate", ["metric", "proxy"])
def test_a_search_is_that_of_the_whole_model(folder, tmp_path, evaluate, capsys):
    for way in ("cpu", "stream"):
        out = ["--out", str(tmp_path / way), "--window", "2", "--exact", "--evaluate", evaluate]
        limit = ["--eval-limit", "4"] if evaluate == "metric" else ["--proxy-tokens", "100"]
        run(way, ["search", str(folder / "model"), *out, *limit, *data(folder)], capsys)
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "stream").read_bytes()


@pytest.mark.parametrize("recover", [[], ["--recover", "refit"], ["--recover", "refit", "--private", "3"]])
def test_a_merge_is_that_of_the_whole_model(folder, tmp_path, recover, capsys):
    for way in ("cpu", "stream", "auto"):
        merge = ["merge", str(folder / "model"), str(tmp_path / way), "--layers", "1-3", "--exact", *recover]
        run(way, [*merge, *data(folder)], capsys)
    for other in ("stream", "auto"):
        files = {p.name: p.read_bytes() for p in (tmp_path / other).iterdir() if p.is_file()}
        assert files == {p.name: p.read_bytes() for p in (tmp_path / "cpu").iterdir() if p.is_file()}
    ff.verify(tmp_path / "stream")


def test_evaluation(folder, capsys):
    said = []
    for way in ("cpu", "stream"):
        run(way, ["eval", str(folder / "model"), *data(folder)[:6], "--json"], capsys)
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]


def test_what_runs_the_merged_model_is_refused_in_one_line(folder, tmp_path, capsys):
    for recover in (["distill"], ["refit", "--recover-rounds", "1"]):
        merge = ["merge", str(folder / "model"), str(tmp_path / "out"), "--layers", "1-3", "--recover", *recover]
        assert main([*merge, *data(folder), "--place", "stream"]) == 1
        assert re.fullmatch(
            r"error: recover: .* runs the merged model.*--place cpu or cuda.*\n", capsys.readouterr().err
        )
        assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(folder, tmp_path, capsys):
    collect = ["collect", str(folder / "model"), str(tmp_path / "s"), "--layers", "1-3", *data(folder)]
    assert main([*collect, "--dry-run", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    room = whole["device_bytes"] - 1
    assert main([*collect, "--budget", str(room), "--dry-run", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (whole["way"], values["way"]) == ("whole", "stream") and values["device_bytes"] <= room
    assert not (tmp_path / "s").exists()
    assert main([*collect, "--budget", "10kB"]) == 1
    assert "budget: 10.0 kB may be used and one block at a time" in capsys.readouterr().err


def test_a_merge_without_passes_is_planned_from_folder_to_folder(folder, tmp_path, capsys):
    merge = f"merge {folder}/model {tmp_path}/out --layers 1-3 --method average --dry-run".split()
    ways = {}
    for words in ([], ["--place", "cpu"], ["--recover", "refit", *data(folder)]):
        assert main([*merge, *words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        ways[found["way"]] = found
    size = ModelSize.of(open_on_disk(folder / "model"))
    takes = max(size.smooth, size.average)
    assert list(ways) == ["files", "whole"] and ways["files"]["host_bytes"] == takes
    assert main([*merge, "--budget", str(takes - 1)]) == 1
    assert f"writing takes {takes} bytes" in capsys.readouterr().err
    assert main([*merge[:-1], "--budget", str(takes - 1)]) == 1 and not (tmp_path / "out").exists()
    assert f"writing takes {takes} bytes" in capsys.readouterr().err


def test_a_budget_makes_the_sketch_smaller_where_it_was_not_given(folder, tmp_path, capsys):
    collect = ["collect", str(folder / "model"), str(tmp_path / "s"), "--window", "6", *data(folder), "--json"]
    found = []
    for given in ([], ["--budget", "300kB"], ["--budget", "300kB", "--sketch", "256"]):
        assert main([*collect, "--tokens", "4000", *given]) == 0
        found.append(json.loads(capsys.readouterr().out)["sketch"])
    assert found == [1024, 128, 256]


def test_training_is_planned_too(folder, tmp_path, capsys):
    words = [str(folder / "model"), str(tmp_path / "out"), *data(folder)[:6], "--steps", "1"]
    for verb in (["finetune", *words], ["project", *words, "--keep", "0.5"]):
        assert main([*verb, "--dry-run", "--json"]) == 0
        needed = json.loads(capsys.readouterr().out)["device_bytes"]
        assert main([*verb, "--budget", str(needed - 1)]) == 1
        assert f"budget: training takes about {needed} bytes" in capsys.readouterr().err
        assert main([*verb, "--place", "stream"]) == 1
        assert "place: got stream, but training needs all weights at once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_trained_is_counted(folder):
    from ffmerge_fast.projecting.projector import resolve
    from ffmerge_fast.projecting.selection import trained_numbers
    from ffmerge_fast.projecting.settings import Widths

    model = ff.from_pretrained(folder / "model")
    student, beside = trained_numbers(model, *resolve(model, Widths(0.5)))
    projector = ff.project(model, keep=0.5)
    assert student == sum(p.numel() for p in projector.student.parameters())
    counts = projector.parameters()
    assert beside == counts["projections"] + counts["residuals"] + counts["plain"]
