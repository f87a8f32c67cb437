"""A process killed before any of its file operations leaves what was there or what it wrote; the next one tidies up."""

import os
import signal
import sys
from pathlib import Path

import pytest

from ffmerge_fast.support import files
from ffmerge_fast.support.errors import FFMergeError

pytestmark = pytest.mark.skipif(files.fcntl is None, reason="needs POSIX")
OPERATIONS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.rmtree", "open", "ctypes.dlsym")


def write_folder(path, overwrite=True):
    with files.new_folder(path, overwrite, lambda file: str(file) in ("a", "b/c")) as beside:
        (beside / "a").write_text("new")
        (beside / "b").mkdir()
        (beside / "b" / "c").write_text("new")


def write_file(path):
    files.write_text(path, "new")


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed_before(step: int, action) -> bool:
    """Whether a process that runs `action` was killed before its file operation number `step`; else it ended well."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in OPERATIONS and (event != "open" or (arguments[2] or 0) & os.O_CREAT):
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(hook)
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), status
    return status != 0


OLD = {"x/out/a": "old", "x/out/b/c": "old"}
NEW = {"x/out/a": "new", "x/out/b/c": "new"}
KINDS = {  # what is there before, what is wanted, how, what may be found
    "new folder": ({}, NEW, write_folder, {"old", "new"}),
    "folder exchanged": (OLD, NEW, write_folder, {"old", "new"}),
    "folder renamed twice": (OLD, NEW, write_folder, {"old", "new", "moved"}),
    "new file": ({}, {"x/out": "new"}, write_file, {"old", "new"}),
    "replaced file": ({"x/out": "old"}, {"x/out": "new"}, write_file, {"old", "new"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_before_each_operation(kind, tmp_path, monkeypatch):
    before, wanted, write, outcomes = KINDS[kind]
    if kind == "folder renamed twice":
        monkeypatch.setattr(files, "_exchanged_at_once", lambda *folders: False)
    step, seen = 0, set()
    while True:
        root, target = tmp_path / str(step), tmp_path / str(step) / "x" / "out"
        root.mkdir()
        for name, text in before.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        if not killed_before(step, lambda target=target: write(target)):
            break
        left = content(root)
        here = {name: text for name, text in left.items() if name.startswith("x/out")}
        seen.add("new" if here == wanted else "old" if here == before else "moved" if not target.exists() else step)
        if write is write_folder and before:
            with pytest.raises(FFMergeError, match="not empty"):  # what was moved aside is back
                files.check_new_folder(target)
            assert content(root) in (before, wanted)
        write(target)
        assert content(root) == wanted and os.listdir(root / "x") == ["out"], step
        step += 1
    assert content(root) == wanted and os.listdir(root / "x") == ["out"]
    assert seen == outcomes


def test_the_system_exchanges_in_one_step(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    if not files._exchanged_at_once(tmp_path / "one", tmp_path / "other"):
        pytest.skip("not on this file system")
    assert content(tmp_path) == {"one/is": "other", "other/is": "one"}


def test_nothing_is_removed_while_its_process_lives(tmp_path):
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with files.new_folder(tmp_path / "out") as beside:
                (beside / "a").write_text("the child's")
                os.write(ready[1], b".")
                os.read(go[0], 1)
            os._exit(0)
        finally:
            os._exit(1)
    os.read(ready[0], 1)
    files.check_new_folder(tmp_path / "out")
    files.remove_leftovers(tmp_path)
    with files.new_folder(tmp_path / "out"):  # another of the same name, which is empty when it appears
        assert len(os.listdir(tmp_path)) == 2
    assert len([name for name in os.listdir(tmp_path) if name.endswith(".tmp")]) == 1
    os.write(go[1], b".")
    assert os.waitpid(child, 0)[1] == 0
    assert content(tmp_path) == {"out/a": "the child's"} and os.listdir(tmp_path) == ["out"]


def test_leftovers_of_other_names_and_of_others_stay(tmp_path):
    stay = (".out.tmp", ".out.12345678.tmp.txt", "out.12345678.tmp", ".other.12345678.tmp", ".out.123.tmp")
    for name in (*stay, ".out.12345678.tmp"):
        (tmp_path / name).mkdir()
    files.write_text(tmp_path / "out", "")
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, "out"])
