"""How a command ends when its surroundings fail: interrupted, nobody reads, no disk, no memory, half a torchrun job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_cli import _data, folder, refuse, text  # noqa: F401  (fixtures)

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
FFMERGE = [sys.executable, "-m", "ffmerge_fast.cli"]


def ends(*argv, command=FFMERGE, **environment) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    found = subprocess.run([*command, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, env=environment)
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("argv", [("--help",), ("--version",), ("env", "--json")], ids=str)
def test_nobody_reads(argv, buffered):
    """As of other commands: SIGPIPE's status, nothing said."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": buffered}
    found = subprocess.run([*FFMERGE, *argv], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("argv", ["--help", "env"])
def test_no_room_for_the_answer(argv):
    status, _, err = ends(command=["bash", "-c", f"{sys.executable} -m ffmerge_fast.cli {argv} > /dev/full"])
    assert (status, err) == (1, "error: standard output cannot be written (No space left on device)\n")


def test_closed_streams():
    python = f"{sys.executable} -m ffmerge_fast.cli"
    assert ends(command=["bash", "-c", f"{python} env >&-"])[0] == 0
    assert ends(command=["bash", "-c", f"{python} inspect nothing 2>&-"]) == (1, "", "")


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (dict(WORLD_SIZE="2"), "MASTER_ADDR|MASTER_PORT|RANK"),
        (dict(WORLD_SIZE="two", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1"), "WORLD_SIZE: got 'two'"),
        (dict(WORLD_SIZE="2", RANK="x", MASTER_ADDR="localhost", MASTER_PORT="1"), "RANK: got 'x'"),
        (dict(WORLD_SIZE="2", RANK="2", MASTER_ADDR="localhost", MASTER_PORT="1"), "RANK: got '2'"),
        (dict(WORLD_SIZE="0", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1"), "RANK: got '0'"),
    ],
)
def test_half_a_torchrun_job(capsys, monkeypatch, environment, named):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = refuse(capsys, "env")
    assert any(part in line for part in named.split("|")) and "start with torchrun, or unset WORLD_SIZE" in line


def test_a_rank_without_a_job_still_writes(capsys, monkeypatch, folder, tmp_path):  # noqa: F811
    from ffmerge_fast.cli.main import main

    monkeypatch.setenv("RANK", "1")
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "ffmerge.json").exists() and capsys.readouterr().out


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "meta", "cuda:99", ""])
def test_devices_there_are_none(capsys, folder, name):  # noqa: F811
    assert refuse(capsys, "eval", folder, "--device", name).startswith(f"error: --device: got '{name}', wanted 'cpu'")


# A failing import, put in the way of torch: what too little memory and Ctrl-C look like at that moment.
IN_THE_WAY = """
import sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            raise {error}
sys.meta_path.insert(0, Finder())
from ffmerge_fast.cli.main import main
sys.exit(main(["env"]))
"""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        ("KeyboardInterrupt", 130, "interrupted"),
        ("MemoryError", 1, "error: there is too little memory"),
        (
            "ImportError('libtorch.so: failed to map segment from shared object')",
            1,
            "error: there is too little memory",
        ),
        ("ImportError('no such symbol')", 1, "error: a package cannot be imported (no such symbol)"),
    ],
)
def test_imports_that_fail(error, status, line):
    found = ends("-c", IN_THE_WAY.format(error=error), command=[sys.executable])
    assert found[0] == status and found[1] == "" and found[2].startswith(line) and found[2].count("\n") == 1, found


@pytest.mark.slow
def test_ctrl_c_says_where_the_last_state_is(folder, text, tmp_path):  # noqa: F811
    options = (*_data(text), "--batch-size", 4, "--steps", 100_000, "--save-every", 1, "--eval-limit", 4)
    process = subprocess.Popen(
        [*FFMERGE, *map(str, ("finetune", folder, tmp_path / "out", *options))],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    work, deadline = tmp_path / "out.finetune", time.monotonic() + 120
    while not list(work.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    (last,) = work.glob("checkpoint-*")
    step = last.name.partition("-")[2]
    assert (process.returncode, out) == (130, "")
    assert err == f"stopped after step {step}; the last good state is {last}\n" and not (tmp_path / "out").exists()
