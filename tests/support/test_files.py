"""Files and folders are complete, or as they were before."""

import errno

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
