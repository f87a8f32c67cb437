"""Trains a tied model with dropout in a process of its own; run by test_resume.py. Usage: FOLDER STEPS HOW."""

import os
import signal
import sys

import torch

from ffmerge_fast.driver.training.finetune import finetune
from tests.helpers.training import lm_batches, tied_gpt2

SETTINGS = dict(lr=1e-2, accumulate=2, save_every=4, eval_every=4, log_every=3, warmup=2)


def train(folder, steps, log=None, **changes):
    """The same run every time; returns (model, result)."""
    model = tied_gpt2(dropout=0.2)
    held_out = lm_batches(1, seed=1)[0]

    def evaluate(m):
        return float(m(**held_out).loss)

    settings = SETTINGS | changes
    return model, finetune(model, lm_batches(5), steps, output_dir=folder, evaluate=evaluate, log=log, **settings)


def _signal_at(step, number):
    def log(row):
        if row["step"] >= step:
            os.kill(os.getpid(), number)

    return log


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, steps, how = sys.argv[1:]
    train(folder, int(steps), _signal_at(9, signal.SIGKILL if how == "kill" else signal.SIGINT))
