"""Every numeric option of every command at -1, 0, huge, nan and "x", every path at impossible places.

The command lines are made from the parser, so that a new option is tried too. Allowed: status 0 with what was promised,
or 1 or 2 with one line of ours; nothing else in the folder, nothing left elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import tempfile
from pathlib import Path

import pytest
import torch

from ffmerge_fast.checkpoint.verify import verify
from ffmerge_fast.cli.main import main
from ffmerge_fast.cli.parser import command_names, parser
from tests.cli.test_cli import _tokenizer
from tests.helpers.tiny_models import tiny_model

pytest.importorskip("transformers")
NUMBERS = ("-1", "0", str(10**30), "nan", "x", "1e400", "")
PLACES = ("missing", "folder", "file", "below-a-file", "device", "pipe", "too-long", "nul", "newline", "empty")
DATA = "--data {text} --max-length 8 --batch-size 4"
TRAINING = f"{DATA} --eval-limit 4 --steps 1"
LINES = {  # command: a line that works, with {places}; more lines where options exclude each other
    "demo": ["{out}"],
    "inspect": ["{model}"],
    "collect": [f"{{model}} {{out}} --layers 0-1 {DATA} --tokens 60"],
    "plan": ["{statistics} --layers 0-1 --out {out}", "{statistics} --sweep 2 --csv {out}"],
    "search": [
        f"{{model}} --window 2 --statistics {{statistics}} {DATA.replace('--batch-size 4', '')} --eval-limit 4",
        f"{{model}} --window 2 {DATA} --tokens 60 --evaluate proxy --proxy-tokens 30",
    ],
    "merge": [
        "{model} {out} --plan {plan}",
        f"{{model}} {{out}} --layers 0-1 {DATA} --tokens 60 --recover refit+distill --recover-steps 1",
    ],
    "finetune": [f"{{model}} {{out}} {TRAINING} --teacher {{model}} --schedule linear --alpha 0.5"],
    "project": [
        f"{{model}} {{out}} {TRAINING} --d-model 8 --d-ff 16 --attention head_dim --schedule cosine --distill",
        f"{{model}} {{out}} {TRAINING} --keep 0.5 --attention head_dim",
    ],
    "fold": ["{model} {work} {out}"],
    "eval": [f"{{model}} {DATA} --eval-limit 4 --stream host"],
    "export": ["{merged} {out} --expand"],
    "verify": ["{merged}"],
    "env": [""],
}


def actions(command: str) -> list[argparse.Action]:
    """Options and arguments of a command that take a value."""
    (verbs,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [a for a in verbs.choices[command]._actions if a.nargs != 0 and a.choices is None]


def kind_of(action: argparse.Action) -> str:
    """What the values of an option are, by what its type says of "\\0", which only text may hold."""
    if action.type is None:
        return "text"
    try:
        action.type("\0")
    except argparse.ArgumentTypeError as error:
        return "path" if "cannot be a path" in str(error) else "number"
    raise AssertionError(f"{action.dest}: takes anything")


TEXTS = {"metric", "layers", "prefix", "device", "ffn_layers", "ffn_up", "ffn_down", "ffn_gate"}
TEXTS |= {"leave_out", "source_lang", "target_lang", "text_column", "label_column"}


def test_every_option_has_a_type_that_is_tried():
    """What takes any text is named here, so that nothing takes a number or a path unseen."""
    kinds = {command: {a.dest: kind_of(a) for a in actions(command)} for command in command_names()}
    assert set(LINES) == set(kinds)
    assert {dest for found in kinds.values() for dest, kind in found.items() if kind == "text"} == TEXTS
    wanted = sum(
        len(NUMBERS) if kind == "number" else len(PLACES) if kind == "path" else 0
        for command, found in kinds.items()
        for kind in found.values()
    )
    assert wanted >= 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model with data, statistics, a plan, a merged folder and a work folder of `project`."""
    root = tmp_path_factory.mktemp("made")
    tiny_model("gpt2", layers=3).save_pretrained(root / "model")
    _tokenizer().save_pretrained(root / "model")
    ids = torch.randint(0, 60, (40 * 8,), generator=torch.Generator().manual_seed(0))
    (root / "text").write_text(" ".join(f"w{i}" for i in ids.tolist()))
    places = {name: root / name for name in ("model", "text", "statistics", "plan", "merged", "work")}
    for line in (
        f"collect {{model}} {{statistics}} --window 3 {DATA} --tokens 60",
        "plan {statistics} --layers 0-1 --out {plan}",
        "merge {model} {merged} --plan {plan}",
        f"project {{model}} {root / 'small'} {TRAINING} --d-model 8 --attention head_dim --work-dir {{work}}",
    ):
        assert main([*line.format(**places).split(), "-q"]) == 0
    return places


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """A folder for temporary files of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


def impossible(place: str, root: Path) -> str:
    """A path of this kind in a folder that is made anew for each command line."""
    here = root / "places"
    here.mkdir()
    if place in ("file", "below-a-file"):
        (here / "file").write_text("some words of no use")
    if place == "folder":
        (here / "folder").mkdir()
        (here / "folder" / "kept").write_text("mine")
    if place == "pipe":
        os.mkfifo(here / "pipe")
    named = {"below-a-file": "file/below", "too-long": "n" * 300, "nul": "a\0b", "newline": "new\nline"}
    return {"device": "/dev/null", "empty": ""}.get(place, str(here / named.get(place, place)))


def contents(root: Path) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() if f.is_file() else b"" for f in root.rglob("*")}


def tried(command: str, kind: str) -> list[argparse.Action]:
    """Its options and arguments of a kind; demo trains two models, and its seed is the one of all commands."""
    return [a for a in actions(command) if kind_of(a) == kind and (command, a.dest) != ("demo", "seed")]


def with_value(command: str, action: argparse.Action, value: str, places: dict) -> list[str]:
    """A line of the command in which this value stands for the option or argument."""
    flag = (action.option_strings or [None])[0]
    lines = LINES[command]
    line = next((line for line in lines if flag and f"{flag} " in f"{line} "), lines[-1 if flag in LATER else 0])
    words = [word.format(**places) for word in line.split()]
    if flag in words:
        words[words.index(flag) + 1] = value
        return [command, *words]
    if flag:
        return [command, *words, flag, value]
    positionals = [a.dest for a in actions(command) if not a.option_strings]
    words[positionals.index(action.dest)] = value
    return [command, *words]


LATER = {"--features", "--cache-dir", "--max-memory", "--ridge", "--recover-rounds", "--delta-rank", "--recover-lr",
         "--tokens", "--eval-data"}  # fmt: skip


def outcome(argv: list[str], root: Path, capfd, out: Path) -> None:
    """Run the line and hold it to the promise."""
    before = contents(root)
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    printed, said = capfd.readouterr()
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
    after = contents(root)
    assert status in (0, 1, 2), argv
    if status == 0:
        assert not lines and json.loads(printed) is not None and "NaN" not in printed, (argv, said)
        if out.is_dir():
            assert verify(out)["parameters"] > 0
        return
    assert len(lines) == 1 and lines[0].startswith("error: ") and not printed, (argv, said)
    assert not re.match(r"error: (this is a bug|\w*(Error|Exception)\b)", lines[0]), (argv, lines[0])
    left = {name for name in after.keys() ^ before.keys() if not re.match(r"[^/]*(out|work)\.(finetune|project)", name)}
    assert not left and all(after[name] == content for name, content in before.items()), (argv, left)
    assert not os.listdir(tempfile.gettempdir()), argv


@pytest.mark.parametrize("command", command_names())
def test_numbers(command, made, tmp_path, capfd):
    for action in tried(command, "number"):
        for i, value in enumerate(NUMBERS):
            root = tmp_path / f"{action.dest}-{i}"
            root.mkdir()
            argv = with_value(command, action, value, made | {"out": root / "out"})
            outcome([*argv, "--json"], root, capfd, root / "out")


@pytest.mark.parametrize("command", command_names())
def test_paths(command, made, tmp_path, capfd):
    for action in tried(command, "path"):
        for place in PLACES:
            root = tmp_path / f"{action.dest}-{place}"
            root.mkdir()
            argv = with_value(command, action, impossible(place, root), made | {"out": root / "out"})
            if command != "demo" or place not in ("missing", "newline"):  # there it would train
                outcome([*argv, "--json"], root, capfd, root / "out")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
