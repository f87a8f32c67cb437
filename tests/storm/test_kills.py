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
from tests.storm.scenes import fill

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


@pytest.mark.parametrize("how", ["kill", "full"])
def test_nothing_is_lost(how, tmp_path):
    fill(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "pristine")
    command = [sys.executable, "-m", "tests.storm.hindered", how, tmp_path / "pristine", tmp_path / "here"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []
