"""`ffmerge project` in processes of its own: killed and gone on, under torchrun, with the base on disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ffmerge_fast as ff
from ffmerge_fast.cli.main import main
from tests.cli.test_cli import _data, folder, refuse, run, text  # noqa: F401  (fixtures)
from tests.helpers.tiny_models import logits, tiny_inputs

pytest.importorskip("transformers")
REPOSITORY = Path(__file__).resolve().parents[2]
WIDTHS = ("--d-model", 8, "--d-ff", 12, "--attention", "head_dim", "--lr", 1e-2, "--calibration", 4)
SETTINGS = (*WIDTHS, "--batch-size", 4, "--eval-limit", 8, "--schedule", "cosine", "--warmup", 3, "--distill")


def start(*argv, launch=("-m", "ffmerge_fast.cli"), **options):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "project", *map(str, argv)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
def test_kill_9_and_go_on(capsys, folder, text, tmp_path):  # noqa: F811
    """Optimiser, schedule, random states (the student has dropout), best metric and weights end as if never killed."""
    steps = 60
    options = (*_data(text), *SETTINGS, "--steps", steps, "--eval-every", 15, "--save-every", 3, "--accumulate", 2)
    killed = start(folder, tmp_path / "killed", *options)
    deadline, work = time.monotonic() + 120, tmp_path / "killed.project"
    while not list(work.glob("checkpoint-*")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    (at,) = (int(path.name.partition("-")[2]) for path in work.glob("checkpoint-*"))
    assert 3 <= at < steps and not (tmp_path / "killed").exists()
    changed = [str(o) for o in options]
    changed[changed.index("--warmup") + 1] = "4"
    assert "other warmup: 3 there, 4 now" in refuse(capsys, "project", folder, tmp_path / "killed", *changed)
    changed = (*options, "--weight-decay-on-projections", 0.1)
    message = refuse(capsys, "project", folder, tmp_path / "killed", *changed)
    assert "optimizer.weight_decay_on_projections: 0.0 there" in message

    found = run(capsys, "project", folder, tmp_path / "killed", *options)
    wanted = run(capsys, "project", folder, tmp_path / "whole", *options)
    assert [found[key] for key in ("best", "best_step")] == [wanted[key] for key in ("best", "best_step")]
    for file in (
        "killed{}/model",
        *(f"killed.project{{}}/checkpoint-{steps}/{f}" for f in ("model", "optimizer", "rng")),
    ):
        one, other = (
            load_file(tmp_path / f"{file.format('')}.safetensors".replace("killed", n)) for n in ("killed", "whole")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items()), file
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
            for line in log.read_text().splitlines()
        ]
        for log in (work / "log.jsonl", tmp_path / "whole.project" / "log.jsonl")
    ]
    assert logs[0] == logs[1] and logs[0][-1]["step"] == steps


@pytest.mark.parametrize("taught", [False, True])
def test_the_same_with_the_base_offloaded(capsys, folder, text, tmp_path, taught):  # noqa: F811
    """Also where the base is the teacher, which then stays in memory."""
    settings = [o for o in SETTINGS if taught or o != "--distill"]
    places = {"none": (), "cpu": ("--offload-base", "cpu"), "disk": ("--offload-base", "disk")}
    for name, options in places.items():
        run(capsys, "project", folder, tmp_path / name, *_data(text), *settings, "--steps", 4, *options)
    wanted, *others = (load_file(tmp_path / name / "model.safetensors") for name in places)
    for found in others:
        assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert not list(tmp_path.glob("*.project/base-*"))  # the model's own file was read in place


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_torchrun(capsys, folder, text, tmp_path, parallel):  # noqa: F811
    """Two ranks do what one process does with both ranks' batches."""
    shutil.copytree(folder, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    options = (*_data(text), *SETTINGS, "--steps", 4, "--eval-every", 2, "--save-every", 2)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ffmerge_fast.cli")
    ranks = start(tmp_path / "base", tmp_path / "two", *options, "--parallel", parallel, "--json", launch=torchrun)
    out, errors = ranks.communicate(timeout=240)
    assert ranks.returncode == 0, errors[-3000:]
    found = json.loads(out[out.index("{") :])
    alone = [str(o) for o in options]
    alone[alone.index("--calibration") + 1] = "8"
    wanted = run(capsys, "project", tmp_path / "base", tmp_path / "one", *alone, "--accumulate", 2)
    assert found["best"] == pytest.approx(wanted["best"], rel=1e-4) and found["best_step"] == wanted["best_step"]
    small, other = (ff.from_pretrained(tmp_path / name) for name in ("two", "one"))
    assert type(small).__name__ == "GPT2LMHeadModel"
    inputs = tiny_inputs(small)
    torch.testing.assert_close(logits(small, inputs), logits(other, inputs), atol=2e-3, rtol=2e-3)
    assert main(["verify", str(tmp_path / "two"), "-q"]) == 0
