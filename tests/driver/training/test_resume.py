"""A run that is killed, interrupted or out of disk goes on exactly where its last checkpoint was."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver.training import state as training_state
from tests.helpers.resume_worker import train
from tests.helpers.training import assert_equal, lm_batches, parameters, tied_gpt2

STEPS = 14
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return (*train(folder, STEPS), folder)


def _worker(folder, how):
    worker = [sys.executable, "-m", "tests.helpers.resume_worker", str(folder), str(STEPS), how]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(worker, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)


def _facts(history):
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in history]


def test_resume_after_kill_9_is_bit_exact(tmp_path, uninterrupted):
    wanted, result, folder = uninterrupted
    process = _worker(tmp_path, "kill")
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]  # steps 9 and on are lost

    model, resumed = train(tmp_path, STEPS)
    assert_equal(parameters(model), parameters(wanted))
    assert _facts(resumed.history) == _facts(result.history)
    assert (resumed.best_metric, resumed.best_step) == (result.best_metric, result.best_step)
    for file in ("model", "optimizer", "rng"):
        name = f"checkpoint-{STEPS}/{file}.safetensors"
        assert_equal(load_file(tmp_path / name), load_file(folder / name))
    assert model.transformer.h[1].mlp is model.transformer.h[2].mlp


def test_interrupt_saves_and_resumes_exactly(tmp_path, uninterrupted):
    wanted, result, _ = uninterrupted
    process = _worker(tmp_path, "interrupt")
    assert "KeyboardInterrupt: stopped after step 9" in process.stderr
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]
    model, resumed = train(tmp_path, STEPS)
    assert_equal(parameters(model), parameters(wanted))
    assert _facts(resumed.history) == _facts(result.history)


def test_finished_run_is_left_alone(tmp_path):
    model, result = train(tmp_path, 4)
    again, repeated = train(tmp_path, 4)
    assert_equal(parameters(model), parameters(again))
    assert repeated.history == result.history


def test_folder_holds_each_weight_once_and_no_pickle(tmp_path):
    model, result = train(tmp_path, 8)
    names = {p.name for p in tmp_path.rglob("*")}
    assert names == {"log.jsonl", "checkpoint-8", f"best-{result.best_step}", "model.safetensors",
                     "optimizer.safetensors", "rng.safetensors", "trainer_state.json"}  # fmt: skip
    weights = load_file(tmp_path / "checkpoint-8/model.safetensors")
    assert set(weights) == {name for name, _ in model.named_parameters()}
    assert not any("h.2.mlp" in name or "lm_head" in name for name in weights)
    moments = load_file(tmp_path / "checkpoint-8/optimizer.safetensors")
    assert len([name for name in moments if name.startswith("exp_avg_sq/")]) == len(weights)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == result.history


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(lr=2e-2), "made with other lr: 0.01 there, 0.02 now; .*--fresh"),
        (dict(accumulate=1), "other accumulate: 2 there"),
        (dict(schedule="constant"), "other schedule: 'inverse_sqrt' there"),
        (dict(seed=3), "other seed: 0 there"),
        (dict(resume=False), "holds checkpoint-4 of an earlier run"),
    ],
)
def test_changed_settings_are_named(tmp_path, changes, words):
    train(tmp_path, 4)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FFMergeError, match=words) as caught:
        train(tmp_path, 8, **changes)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_model_is_refused(tmp_path):
    from ffmerge_fast.driver.training.finetune import finetune

    train(tmp_path, 4)
    model = tied_gpt2()
    model.transformer.h[3].mlp = model.transformer.h[1].mlp
    with pytest.raises(FFMergeError, match="resume: "):
        finetune(model, lm_batches(5), 8, output_dir=tmp_path)


def test_run_can_be_made_longer(tmp_path, uninterrupted):
    train(tmp_path, 8)
    model, _ = train(tmp_path, STEPS)
    assert_equal(parameters(model), parameters(uninterrupted[0]))


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, uninterrupted):
    real = safetensors.torch.save_file

    def save_file(tensors, path, *metadata):
        if "checkpoint-8" in str(path) and "optimizer.safetensors" in path.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, *metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(FFMergeError, match="checkpoint-8 could not be written .*No space left") as caught:
        train(tmp_path, STEPS)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.glob("*checkpoint*")) == ["checkpoint-4"]
    assert not list(tmp_path.glob(".*.tmp"))

    monkeypatch.undo()
    model, _ = train(tmp_path, STEPS)
    assert_equal(parameters(model), parameters(uninterrupted[0]))


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    leftover = tmp_path / ".checkpoint-4.0a1b2c3d.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    train(tmp_path, 4)
    assert not leftover.exists()


def test_damaged_checkpoint_is_named(tmp_path):
    train(tmp_path, 4)
    file = tmp_path / "checkpoint-4/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FFMergeError, match="checkpoint-4 cannot be read .* remove it"):
        train(tmp_path, 8)


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FFMergeError, match="output_dir: .*file cannot be made"):
        train(tmp_path / "file", 4)


def test_random_states_round_trip(tmp_path):
    import random

    import numpy as np
    from safetensors.torch import save_file

    states = {f"rank0/{name}": state for name, state in training_state.random_states().items()}
    save_file(states, tmp_path / "rng.safetensors")
    draws = [(torch.rand(2).tolist(), np.random.rand(2).tolist(), random.gauss(0, 1))]
    training_state.load_random_states(tmp_path, rank=0)
    draws.append((torch.rand(2).tolist(), np.random.rand(2).tolist(), random.gauss(0, 1)))
    assert draws[0] == draws[1]
