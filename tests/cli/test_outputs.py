"""What can be known of outputs before the work is refused before any model is loaded, and nothing is changed."""

import os
import shutil
from pathlib import Path

import pytest

from ffmerge_fast.cli import options, outputs
from ffmerge_fast.cli.main import main
from ffmerge_fast.cli.parser import parser
from tests.helpers.tiny_models import tiny_model

STEPS = ("--steps", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("of") / "model"
    tiny_model("gpt2", layers=3).save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, model, monkeypatch):
    """A folder to stand in, with some of everything; after the test it must be as it was."""
    from ffmerge_fast.checkpoint import folder, trusted
    from ffmerge_fast.merging.statistics import CorrelationStats

    def loaded(*args, **options):
        raise AssertionError("loaded before the outputs were checked")

    monkeypatch.setattr(folder, "from_pretrained", loaded)
    monkeypatch.setattr(trusted, "load_processor", loaded)
    monkeypatch.setattr(CorrelationStats, "load", loaded)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(model, "m")
    for name in ("text", "s", "clone/thesis.txt", "repository/.git/HEAD", "full/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("mine")
    for name in ("clone", "repository"):
        shutil.copytree(model, name, dirs_exist_ok=True)
    Path("folder").mkdir()
    os.mkfifo("pipe")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*") if not p.is_fifo()}
    yield tmp_path
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*") if not p.is_fifo()} == before


def refuse(capsys, *argv) -> str:
    """One line, of ours (1) or of a path that cannot be (2)."""
    try:
        assert main(list(argv)) == 1
    except SystemExit as usage:
        assert usage.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    return line


FILES = {  # an option that names a file to write, in a command that is complete but for its value
    "collect": ("collect", "m", "{}", "--data", "text", "--window", "2"),
    "plan --out": ("plan", "s", "--window", "2", "--out", "{}"),
    "plan --csv": ("plan", "s", "--sweep", "2", "--csv", "{}"),
    "search --out": ("search", "m", "--window", "2", "--data", "text", "--out", "{}"),
    "search --resume": ("search", "m", "--window", "2", "--data", "text", "--resume", "{}"),
}
FOLDERS = {
    "merge": ("merge", "m", "{}", "--layers", "0-1"),
    "export": ("export", "m", "{}"),
    "fold": ("fold", "m", "folder", "{}"),
    "finetune": ("finetune", "m", "{}", "--data", "text", *STEPS),
    "project": ("project", "m", "{}", "--data", "text", *STEPS, "--keep", "0.5"),
}
WORK = {
    "collect --cache-dir": ("collect", "m", "o", "--data", "text", "--window", "2", "--cache-dir", "{}"),
    "merge --cache-dir": ("merge", "m", "o", "--data", "text", "--window", "2", "--cache-dir", "{}"),
    "finetune --work-dir": ("finetune", "m", "o", "--data", "text", *STEPS, "--work-dir", "{}"),
    "project --work-dir": ("project", "m", "o", "--data", "text", *STEPS, "--keep", "0.5", "--work-dir", "{}"),
}
BAD = ("a" * 300, "text/x", "pipe/x", "nul\0", "/proc/none/x")


def put(command, value):
    return [part.format(value) if part == "{}" else part for part in command]


@pytest.mark.parametrize("command", FILES)
def test_files(capsys, place, command):
    for bad in (*BAD, "folder", "m", "pipe", "/dev/null", *(["text"] if "s" not in FILES[command] else ["s"])):
        line = refuse(capsys, *put(FILES[command], bad))
        assert line.startswith("error: ") and len(line) < 500, bad
    assert ("read by" in line) and ("give another file" in line)


@pytest.mark.parametrize("command", FOLDERS)
def test_folders(capsys, place, command):
    for bad in (*BAD, "", "full", ".", "m", "text", "pipe"):
        assert refuse(capsys, *put(FOLDERS[command], bad)).startswith("error: "), bad
    reasons = {
        ".": "is or holds the model's own", "..": "is or holds the model's own", "m": "the model's own folder",
        "clone": "holds thesis.txt", "repository": "holds .git/HEAD", "full": "holds x", "text": "is a file",
    }  # fmt: skip
    for bad, reason in reasons.items():
        line = refuse(capsys, *put(FOLDERS[command], bad), "--overwrite")
        assert reason in line, line


@pytest.mark.parametrize("command", WORK)
def test_work_folders(capsys, place, command):
    for bad in (*BAD, "text", "pipe"):
        assert refuse(capsys, *put(WORK[command], bad)).startswith("error: "), bad
    if "collect" not in command:
        for bad in (".", "o", "o/in"):  # holds OUT, is OUT, lies in OUT
            assert "keep them apart" in refuse(capsys, *put(WORK[command], bad))


def test_two_outputs_in_one_place(capsys, place):
    search = ("search", "m", "--window", "2", "--data", "text")
    assert "keep them apart" in refuse(capsys, *search, "--out", "folder/../x", "--resume", "x")


@pytest.mark.parametrize("command, share", [("export", 1), ("finetune", 1), ("merge", 1 / 3)])
def test_a_disk_that_is_too_small(capsys, place, monkeypatch, command, share):
    size = os.path.getsize("m/model.safetensors")
    for free, message in ((size * share - 2, "are free on its disk"), (size * share, "loaded before")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(0, 0, int(free)))
        assert message in refuse(capsys, *put(FOLDERS[command], "out"))


def test_a_folder_that_can_be_written_is_not_refused(capsys, place):
    for command in (*FILES.values(), *FOLDERS.values(), *WORK.values()):
        assert "loaded before" in refuse(capsys, *put(command, "new/deep")) or command[0] == "fold"


def test_every_option_that_is_written_says_so():
    """Names that mean an output have the type that is checked."""
    subparsers = next(a for a in parser()._actions if a.dest == "command").choices
    kinds = {"out", "csv", "resume", "cache_dir", "work_dir"}
    found = {
        (verb, action.dest): action.type
        for verb, sub in subparsers.items()
        for action in sub._actions
        if action.dest in kinds and (verb, action.dest) not in {("fold", "work_dir"), ("demo", "out")}
    }
    assert len(found) > 10 and all(
        kind in (outputs.file_to_write, outputs.folder_to_write, outputs.work_folder) for kind in found.values()
    ), found
    assert options.file_to_write is outputs.file_to_write
