"""Commands killed, or told that the disk is full, before each of their file operations; started by test_kills.py.

python -m tests.storm.hindered kill|full PRISTINE HERE [NAME ...]: prints a JSON list of what was not as promised.

Each try is a fork of this process, which has imported everything and computed nothing. Operations are seen by an audit
hook; what safetensors writes in Rust, and the exchange of two folders, by their functions.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.storm.scenes import KILLED, anew, contents

_WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
_FREES = ("os.remove", "os.rmdir")  # what a full disk does not hinder
_EACH = int(os.environ.get("FFMERGE_STORM_EACH", "1"))  # tries of operations that differ in numbers only
_KEPT = re.compile(r"(work|pwork|cache|scores|other)|.*\.lock$")  # for the next run


class Watch:
    """Calls `act` before operation number `at` below a folder; `seen` are all of them."""

    def __init__(self, root: str, at: int | None, act):
        self.root, self.at, self.act = root, at, act
        self.seen: list[str] = []
        self.silent = False

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open" and (not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event in _WRITES or event == "open":
            self.before(event, arguments[0])

    def before(self, event: str, path) -> None:
        path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if self.silent or not os.path.abspath(path).startswith(self.root):
            return
        self.seen.append(f"{event} {os.path.relpath(path, self.root)}")
        if len(self.seen) - 1 == self.at:
            self.act()


def watch_functions(watch: Watch) -> None:
    import safetensors.torch

    from ffmerge_fast.support import files

    def before(module, name, event, place):
        function = getattr(module, name)

        def watched(*arguments, **options):
            watch.before(event, arguments[place])
            return function(*arguments, **options)

        setattr(module, name, watched)

    before(files, "_exchange", "exchange", 0)
    before(safetensors.torch, "serialize_file", "write", 1)


def child(line: str, root: Path, at: int | None, act) -> tuple[int, list[str], str]:
    """(status or minus the signal, operations, what it said) of one run in a fork."""
    notes = Path(tempfile.gettempdir()) / "notes"
    pid = os.fork()
    if not pid:
        status = 70
        try:
            watch = Watch(str(root), at, act)
            said = os.open(str(notes) + ".said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            watch_functions(watch)
            sys.addaudithook(watch)
            from ffmerge_fast.cli.main import main

            try:
                status = main([*line.format(here=root).split(), "-q"])
            except SystemExit as stop:
                status = stop.code
            watch.silent = True
            notes.write_text(json.dumps([watch.seen, sorted(sys.modules)]))
        finally:
            os._exit(status)
    _, code = os.waitpid(pid, 0)
    seen, modules = json.loads(notes.read_text()) if notes.exists() else ([], [])
    notes.unlink(missing_ok=True)
    for module in modules:  # so that the next child finds them
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    said = Path(str(notes) + ".said").read_text().splitlines()
    lines = "\n".join(one for one in said if not one.startswith("warning: "))
    return (-os.WTERMSIG(code) if os.WIFSIGNALED(code) else os.WEXITSTATUS(code)), seen, lines


def kinds(seen: list[str], tried: dict[str, int]) -> list[int]:
    """The operations to try: of those that are alike but for numbers and random names, the first ones."""
    chosen = []
    for i, operation in enumerate(seen):
        alike = re.sub(r"\.[0-9a-z_]{6,}\.|[0-9]+", "#", operation)
        tried[alike] = tried.get(alike, 0) + 1
        if tried[alike] <= _EACH:
            chosen.append(i)
    return chosen


def names(root: Path) -> set[str]:
    return set(contents(root))


def storm(how: str, pristine: Path, root: Path, name: str, tried: dict[str, int]) -> list[str]:
    """What was not as promised."""
    line = KILLED[name]
    anew(pristine, root)
    if "--overwrite" in line:
        shutil.copytree(root / "tuned", root / "out")
    old = contents(root / "out")
    before = contents(root)
    status, seen, said = child(line, root, None, None)
    assert status == 0 and seen, said
    wanted, after = contents(root / "out"), names(root)
    wrong = []
    for at in kinds(seen, tried):
        if how == "full" and seen[at].startswith(_FREES):
            continue
        what = f"{name}: operation {at}, {seen[at]}"
        anew(pristine, root)
        if old:
            shutil.copytree(root / "tuned", root / "out")
        status, _, said = child(line, root, at, _ACTS[how])
        found = contents(root / "out")
        if found not in (old, wanted):
            wrong.append(f"{what}: OUT is neither whole nor as it was: {sorted(found)[:5]}")
        if how == "kill" and status != -signal.SIGKILL:
            wrong.append(f"{what}: was not killed, status {status}")
        if how == "full" and status:
            ours = len(said.splitlines()) == 1 and said.startswith("error: ") and "this is a bug" not in said
            if status != 1 or not ours:
                wrong.append(f"{what}: status {status}, said {said[-300:]!r}")
            left = {n for n in names(root) - set(before) if not _KEPT.match(n)}
            if left:
                wrong.append(f"{what}: left {sorted(left)[:5]}")
        if how == "kill" or status:
            status, _, said = child(line, root, None, None)
            if status or contents(root / "out") != wanted:
                wrong.append(f"{what}: the next run gives another result, status {status}, {said[-300:]!r}")
            elif names(root) != after:
                wrong.append(f"{what}: left after the next run: {sorted(names(root) ^ after)[:5]}")
    return wrong


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_ACTS = {"kill": _kill, "full": _full}

if __name__ == "__main__":
    how, pristine, root, *chosen = sys.argv[1:]
    import torch
    from transformers.utils import logging

    import ffmerge_fast.checkpoint.folder
    import ffmerge_fast.driver.project_run  # noqa: F401
    from tests.helpers.tiny_models import tiny_model

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tiny_model("gpt2")  # imports what transformers imports late
    found, tried = [], {}
    for name in chosen or KILLED:
        tried = tried if how == "full" else {}  # the answer to a full disk is the same in every command
        found += storm(how, Path(pristine), Path(root), name, tried)
    print(json.dumps(found, indent=1))
