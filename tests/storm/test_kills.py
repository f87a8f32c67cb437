"""kill -9, and a full disk, before each file operation of every command that writes.

Allowed after a kill: OUT is absent, as it was, or whole; the same command then gives the promised result bit for bit,
and leaves nothing. A full disk: one line of ours, nothing written, nothing left, and the same afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.ranks import REPOSITORY
from tests.storm.scenes import KILLED, fill

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("kills"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    fill(root / "here")
    shutil.move(root / "here", root / "pristine")
    return root


@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("name", KILLED)
def test_nothing_is_lost(name, how, places):
    command = [sys.executable, "-m", "tests.storm.hindered", how, places / "pristine", places / "here", name]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []
