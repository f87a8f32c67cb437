"""Caches, resume files and work folders used again with something else: one line that names it, or --fresh."""

import shutil

import pytest

import ffmerge_fast as ff
from tests.cli.test_cli import _data, folder, refuse, run, text  # noqa: F401  (fixtures)

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def other(text, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("other") / "text.txt"
    path.write_text(" ".join(reversed(text.read_text().split())))
    return path


def contents(folder):  # noqa: F811
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_collect(capsys, folder, text, other, tmp_path):  # noqa: F811
    options = ("--window", 3, "--tokens", 400, "--batch-size", 4, "--cache-dir", tmp_path / "cache")

    def collect(out, data, *more):
        return ("collect", folder, tmp_path / out, *_data(data), *options, *more)

    run(capsys, *collect("one", text))
    for command, words in (
        (collect("two", other), "made with other data"),
        (collect("two", text, "--seed", 1), "made with other data"),
        (collect("two", text, "--features", "post"), "made with other features: 'pre' there, 'post' now"),
    ):
        line = refuse(capsys, *command)
        assert words in line and "--fresh" in line and not (tmp_path / "two").exists()
    run(capsys, *collect("one again", text))
    run(capsys, *collect("two", other, "--fresh"))
    found = {name: ff.CorrelationStats.load(tmp_path / name) for name in ("one", "one again", "two")}
    first = found["one"].correlation(0, 1)
    assert first.equal(found["one again"].correlation(0, 1)) and not first.equal(found["two"].correlation(0, 1))


def test_search(capsys, folder, text, other, tmp_path):  # noqa: F811
    run(capsys, "collect", folder, tmp_path / "s", *_data(text), "--window", 3, "--tokens", 400)
    run(capsys, "collect", folder, tmp_path / "s2", *_data(other), "--window", 3, "--tokens", 400)
    options = ("--window", 3, "--eval-limit", 4, "--resume", tmp_path / "r.json")

    def search(data, *more, stats="s"):
        return ("search", folder, *_data(data), *options, "--statistics", tmp_path / stats, *more)

    wanted = run(capsys, *search(text))
    before = contents(tmp_path)
    for command, words in (
        (search(other), "made with other data"),
        (search(text, "--metric", "loss"), "made with other metric: 'perplexity' there, 'loss' now"),
        (search(text, "--eval-limit", 5), "made with other eval_limit: 4 there, 5 now"),
        (search(text, stats="s2"), "made with other statistics"),
    ):
        assert words in refuse(capsys, *command) and contents(tmp_path) == before
    assert run(capsys, *search(text))["search"] == wanted["search"]
    file = tmp_path / "r.json"
    content = file.read_text()
    digit = content.index('"2-4": ') + 7
    file.write_text(content[:digit] + "1" + content[digit:])
    assert "is not a file of search scores" in refuse(capsys, *search(text))
    assert run(capsys, *search(text, "--fresh"))["search"] == wanted["search"]


@pytest.mark.parametrize("verb", ["finetune", "project"])
def test_work_folders(capsys, folder, text, other, tmp_path, verb):  # noqa: F811
    options = ("--steps", 2, "--batch-size", 4, "--eval-limit", 4, "--overwrite", "--work-dir", tmp_path / "work")
    options += ("--d-model", 8, "--d-ff", 12, "--attention", "head_dim", "--calibration", 2) * (verb == "project")

    def train(data, *more):
        return (verb, folder, tmp_path / "out", *_data(data), *options, *more)

    run(capsys, *train(text))
    first = contents(tmp_path / "out")
    shutil.copytree(folder, tmp_path / "teacher")
    before = contents(tmp_path)
    for command, words in (
        (train(other), "made with other data"),
        (train(text, "--eval-data", other), "made with other data"),
        (train(text, "--batch-size", 5), "made with other batch_size: 4 there, 5 now"),
        (train(text, "--seed", 1), "made with other seed: 0 there, 1 now"),
        (train(text, "--max-length", 16), "made with other "),
        (train(text, "--eval-limit", 5), "made with other eval_limit: 4 there, 5 now"),
        (train(text, "--metric", "loss"), "made with other metric"),
        (train(text, "--teacher", tmp_path / "teacher"), "made with other distillation"),
    ):
        line = refuse(capsys, *command)
        assert any(
            f"made with other {word}" in line for word in words.removeprefix("made with other ").strip("()").split("|")
        )
        assert "--fresh" in line and contents(tmp_path) == before
    run(capsys, *train(other, "--fresh"))
    assert contents(tmp_path / "out") != first
    run(capsys, *train(text, "--fresh"))
    found = contents(tmp_path / "out")
    assert [path for path in first if found[path] != first[path] and path.suffix == ".safetensors"] == []


def test_another_base_or_other_importances_of_a_projection_are_refused(capsys, folder, text, other, tmp_path):  # noqa: F811
    options = ("--steps", 2, "--batch-size", 4, "--eval-limit", 4, "--work-dir", tmp_path / "work")
    given = (*options, *_data(text), "--d-model", 8, "--d-ff", 12, "--attention", "head_dim")
    options = (*given, "--calibration", 2)
    run(capsys, "project", folder, tmp_path / "out", *options)
    model = ff.from_pretrained(folder)
    ff.importance(model, method="magnitude").save(tmp_path / "scores")
    line = refuse(capsys, "project", folder, tmp_path / "x", *given, "--importance", tmp_path / "scores")
    assert "made with other importance" in line
    line = refuse(capsys, "project", folder, tmp_path / "x", *options, "--calibration", 3)
    assert "made with other calibration: 2 there, 3 now" in line
    shutil.copytree(folder, tmp_path / "base")
    model.get_parameter("transformer.wte.weight").data[3, 5] += 1e-3
    model.save_pretrained(tmp_path / "base")
    assert "made with other base" in refuse(capsys, "project", tmp_path / "base", tmp_path / "x", *options)
    assert not (tmp_path / "x").exists()
    file = tmp_path / "work" / "projection.json"
    file.write_text(file.read_text().replace('"residual": true', '"residual": false'))
    for command in (("project", folder, tmp_path / "x", *options), ("fold", folder, tmp_path / "work", tmp_path / "x")):
        assert "projection.json cannot be read" in refuse(capsys, *command)
