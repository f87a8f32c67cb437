"""What carries a checksum: what was written comes back, or an error, whichever bit is flipped."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ffmerge_fast.support.sealed import (
    DamagedError,
    read_sealed_json,
    read_sealed_tensors,
    write_sealed_json,
    write_sealed_tensors,
)

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(3), "c": torch.ones(5).bfloat16()}
VALUES = {"settings": {"lr": 0.1, "name": "é"}, "scores": {"10-12": 1.5, "2-4": None}, "list": [1, [2.25, True]]}


def flips(path, count):
    """The file with one bit flipped, again and again; as it was at the end."""
    content, choice = path.read_bytes(), random.Random(0)
    for _ in range(count):
        bad = bytearray(content)
        bad[choice.randrange(len(bad))] ^= 1 << choice.randrange(8)
        path.write_bytes(bad)
        yield
    path.write_bytes(content)


def same(tensors):
    return tensors.keys() == TENSORS.keys() and all(
        t.dtype == TENSORS[n].dtype and torch.equal(t, TENSORS[n]) for n, t in tensors.items()
    )


def test_tensors(tmp_path):
    path, header = tmp_path / "x", {"part": "model", "step": 3}
    write_sealed_tensors(path, TENSORS, header)
    tensors, found = read_sealed_tensors(path)
    assert same(tensors) and found == header
    refused = 0
    for _ in flips(path, 400):
        try:
            tensors, found = read_sealed_tensors(path)
            assert same(tensors) and found in (header, None)  # None: a bit of the header's own name
        except DamagedError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 370
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedError):
            read_sealed_tensors(path)


def test_missing_and_unknown_tensors(tmp_path):
    path = tmp_path / "x"
    write_sealed_tensors(path, TENSORS, {})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for tensors, words in (
        ({n: t for n, t in TENSORS.items() if n != "b"}, "b is missing"),
        (TENSORS | {"e": torch.ones(1)}, "e is unknown"),
        (TENSORS | {"a": torch.arange(12.0).view(4, 3)}, "a has changed"),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(DamagedError, match=words):
            read_sealed_tensors(path)
    save_file(TENSORS, path)  # of an earlier version
    assert same(read_sealed_tensors(path)[0])


def test_equal_content_gives_equal_files(tmp_path):
    for name in "xy":
        write_sealed_tensors(tmp_path / name, TENSORS, {"b": 1, "a": {"d": 1, "c": 2}})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_json(tmp_path):
    path = tmp_path / "x.json"
    write_sealed_json(path, VALUES)
    assert read_sealed_json(path) == VALUES
    refused = 0
    for _ in flips(path, 400):
        try:
            found = read_sealed_json(path)
            assert {n: v for n, v in found.items() if n in VALUES} == VALUES  # a bit of the checksum's own name
        except DamagedError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 340
    path.write_text(json.dumps(VALUES))  # of an earlier version
    assert read_sealed_json(path) == VALUES
    for content in ("", "[1]", "3", "{", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(DamagedError):
            read_sealed_json(path)
    with pytest.raises(DamagedError):
        read_sealed_json(tmp_path)
