"""Kept work is of the same run, and of one process at a time."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ffmerge_fast.support.digests import Digest, content_hash, weights_hash
from ffmerge_fast.support.errors import FFMergeError
from ffmerge_fast.support.resume import RunningSums, Signature, in_use
from ffmerge_fast.support.sealed import read_sealed_json, write_sealed_json

ROOT = Path(__file__).resolve().parents[2]


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


# ---------------------------------------------------------------------------------------------------------- signatures


def test_what_differs_is_named_and_what_was_not_kept_is_not_compared():
    now = Signature({"lr": 0.1, "betas": (0.9, 0.99), "data": "x" * 50})
    now.check({}, "resume: w")
    now.check({"lr": 0.1, "betas": [0.9, 0.99], "data": "x" * 50, "more": 1}, "resume: w")
    ending = "; give the same, another place, or --fresh (fresh=True)"
    for kept, words in (
        ({"lr": 0.2}, "lr: 0.2 there, 0.1 now"),
        ({"data": "y"}, "data"),
        ({"betas": None}, "betas: None there, [0.9, 0.99] now"),
    ):
        with pytest.raises(FFMergeError) as error:
            now.check(kept, "resume: w")
        assert str(error.value) == f"resume: w was made with other {words}{ending}"


VALUES = [
    torch.arange(6), torch.arange(6).view(2, 3), torch.arange(6.0), torch.arange(6).int(), torch.tensor(0.0),
    torch.tensor(-0.0), torch.zeros(0), torch.zeros(2, dtype=torch.bfloat16), {"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"},
    [1, [2]], [[1], 2], [1, 2], [12], "12", b"12", 12, None, True, [], {}, "", ["a", "b"], ["ab"], ["a\nb"],
]  # fmt: skip


def test_different_values_have_different_hashes():
    assert len({content_hash(value) for value in VALUES}) == len(VALUES)
    assert content_hash(*VALUES) == content_hash(*VALUES) != content_hash(*VALUES[1:], VALUES[0])
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash(torch.arange(6).view(2, 3).T) == content_hash(torch.arange(6).view(2, 3).T.contiguous())
    digest = Digest()
    for value in VALUES:
        digest.add(value)
    assert (str(digest), digest.count) == (content_hash(*VALUES), len(VALUES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_bit_of_every_weight_counts(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(63, 100), nn.BatchNorm1d(100), nn.Linear(100, 7)).to(dtype)
    wanted = weights_hash(model)
    for tensor in (*model.parameters(), model[1].running_mean):
        raw = tensor.data.view(-1).view(torch.uint8)
        for place in torch.randint(len(raw), (5,)).tolist():
            raw[place] ^= 1
            assert weights_hash(model) != wanted
            raw[place] ^= 1
    weight = model[0].weight.data
    weight.copy_(weight.flip(0))
    assert weights_hash(model) != wanted
    weight.copy_(weight.flip(0))
    assert weights_hash(model) == wanted


# -------------------------------------------------------------------------------------------------------- running sums


class Sums:
    def __init__(self, values=(), seed=0):
        self.values, self.seed = list(values), seed

    def save(self, path, **done):
        write_sealed_json(path, {"values": self.values, "seed": self.seed, "done": done})


def load(path):
    found = read_sealed_json(path)
    return Sums(found["values"], found["seed"]), found["done"]


def kept_in(folder, batches, count, seconds=0, **changes):
    """Sums of so many batches, saved after each, and how many were there before."""
    with RunningSums(folder, "sums", seconds, {"seed": 0} | changes) as cache:
        found, done = cache.resume(load, lambda sums: {"seed": sums.seed})
        sums = found or Sums()
        for number, batch in enumerate(cache.watched(batches)):
            if number >= done.get("batches", 0):
                sums.values.append(batch)
                cache.save_if_due(sums)
            if number + 1 == count:
                break
        return sums.values, done.get("batches", 0)


def test_running_sums_go_on_where_they_were_saved(tmp_path):
    assert kept_in(None, [1, 2, 3], 2) == ([1, 2], 0)
    assert kept_in(tmp_path / "a" / "b", [1, 2, 3], 2, seconds=60) == ([1, 2], 0) and names(tmp_path) == []
    assert kept_in(tmp_path, [1, 2, 3], 2) == ([1, 2], 0)
    assert kept_in(tmp_path, [1, 2, 3], 3) == ([1, 2, 3], 2)
    assert kept_in(tmp_path, [1, 2, 3, 4], 4) == ([1, 2, 3, 4], 3)
    for other in ([1, 2, 4, 4], [2, 1, 3, 4], [1, 2, 3], []):
        with pytest.raises(FFMergeError, match="cache_dir: .*sums.* was made with other data"):
            kept_in(tmp_path, other, 9)
    with pytest.raises(FFMergeError, match="cache_dir: .*sums.* was made with other seed: 0 there, 1 now"):
        kept_in(tmp_path, [1, 2, 3, 4], 4, seed=1)
    assert names(tmp_path) == ["sums.safetensors"]


# --------------------------------------------------------------------------------------------------------------- locks

HOLDER = """
import sys
from ffmerge_fast.support.resume import in_use
with in_use(sys.argv[1], "cache_dir"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Starts a process that holds a path until it is told to end."""
    started = []

    def start(path):
        options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], **options)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_second_says_who_holds_it_and_a_dead_ones_lock_counts_no_more(tmp_path, holder, kind):
    path = tmp_path if kind == "folder" else tmp_path / "deep" / "file"
    process = holder(path)
    for _ in range(2):  # asking changes nothing
        who = re.escape(f"process {process.pid} on {socket.gethostname()}")
        with pytest.raises(FFMergeError, match=f"cache_dir: {path} is in use by {who}; wait"):
            in_use(path, "cache_dir").__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with in_use(path, "cache_dir"), in_use(path, "cache_dir"):  # again by the same thread
        pass
    assert names(tmp_path) in ([], ["deep"])
    process = holder(path)  # freed
    process.communicate()
    assert process.returncode == 0 and names(tmp_path) in ([], ["deep"])


def test_a_lock_is_freed_by_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError), in_use(tmp_path / "new" / "x", "resume"):
            raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="paths of Unix")
def test_a_place_that_cannot_be_locked(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FFMergeError, match="resume: .*file/x cannot be locked") as error:
        in_use(tmp_path / "file" / "x", "resume").__enter__()
    assert "\n" not in str(error.value)
