"""Files and folders are complete, or as they were before."""

import errno
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ffmerge_fast.support import files
from ffmerge_fast.support.errors import FFMergeError

WRITERS = {
    "text": lambda path: files.write_text(path, "é"),
    "json": lambda path: files.write_json(path, {"a": [1, 2]}),
    "tensors": lambda path: files.write_tensors(path, {"x": torch.arange(3)}, {"made": "here"}),
}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_written_whole_and_alone(kind, tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    for _ in range(2):  # new, then over itself
        WRITERS[kind](path)
        assert names(path.parent) == ["file"]
    if kind == "tensors":
        assert load_file(path)["x"].tolist() == [0, 1, 2]
    else:
        assert path.read_text(encoding="utf-8") == {"text": "é", "json": '{\n "a": [\n  1,\n  2\n ]\n}\n'}[kind]


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), ValueError("odd"), KeyboardInterrupt("now")]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_file_that_fails_leaves_the_old_one(error, tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    wanted, message = type(error), str(error)
    if isinstance(error, OSError):
        wanted, message = FFMergeError, "file could not be written .No space left on device.$"
    with pytest.raises(wanted, match=message), files.new_file(path) as beside:
        beside.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", WRITERS)
def test_no_folder_to_write_into(kind, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FFMergeError, match="file/x could not be written") as caught:
        WRITERS[kind](tmp_path / "file" / "x")
    assert "\n" not in str(caught.value)


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with files.new_file(tmp_path / "file") as one, files.new_file(tmp_path / "file") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one" and names(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------- known before the work


IMPOSSIBLE = ["", "a" * 300, "a/" * 3000, "nul\0", "loop/x", "file/x", "pipe/x"]


@pytest.fixture
def places(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    yield tmp_path
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("path", IMPOSSIBLE, ids=lambda path: path[:10] or "empty")
@pytest.mark.parametrize("check", [files.check_new_file, files.check_new_folder, files.check_work_folder])
def test_impossible_places_are_known_before(check, path, places):
    with pytest.raises(FFMergeError) as caught:
        check(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("check, path, message", [
    (files.check_new_file, "folder", "folder is a folder; give a file to write"),
    (files.check_new_file, "pipe", "pipe is a device or a pipe"),
    (files.check_new_file, "/dev/null", "/dev/null is a device or a pipe"),
    (files.check_new_folder, "file", "file is a file; give a folder"),
    (files.check_new_folder, "pipe", "pipe is a file; give a folder"),
    (files.check_work_folder, "file", "file cannot be written: .*file is a file"),
    (files.check_new_folder, "folder", "folder exists and is not empty"),
    (lambda path: files.check_new_folder(path, True), ".", "is or holds the working folder"),
    (lambda path: files.check_new_folder(path, True), "..", "is or holds the working folder"),
    (lambda path: files.check_new_folder(path, True), "/", "/ is or holds the working folder"),
    (lambda path: files.check_new_folder(path, True), "/dev/shm", "give a folder in it: /dev/shm/model"),
])  # fmt: skip
def test_what_is_refused_before(check, path, message, places):
    with pytest.raises(FFMergeError, match=message):
        check(path)


def test_a_folder_in_one_that_cannot_be_written(places, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(places) and access(path, mode))
    (places / "folder" / "in").rmdir()
    with pytest.raises(FFMergeError, match=f"no permission in {places}; give a folder in it: {places}/folder/model$"):
        files.check_new_folder("folder")
    files.check_new_folder("folder/model")
    (places / "folder" / "in").mkdir()


def test_space(places, monkeypatch):
    files.check_space("new/deep", 1)
    files.check_space("folder", shutil.disk_usage(places).free // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5 * 10**6))
    files.check_space("new/deep", 5 * 10**6)
    with pytest.raises(FFMergeError, match="new/deep: at least 5.1 MB will be written and 5.0 MB are free"):
        files.check_space("new/deep", 5 * 10**6 + 10**5)


def test_links_are_written_where_they_lie(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "file")
    files.write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "deep" / "file").read_text() == "x"
    with pytest.raises(files.WriteError, match="a device or a pipe"):
        files.write_text("/dev/null", "x")


def test_new_files_can_be_read_by_others(tmp_path):
    files.write_tensors(tmp_path / "file", {"x": torch.arange(3)})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
