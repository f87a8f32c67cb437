"""One of two ranks that train a student in DDP, each on data of its own; started by test_training.py.

Usage: RANK FOLDER.
"""

import sys

import torch
from safetensors.torch import save_file

import ffmerge_fast as ff
from tests.project.helpers import projector, weights
from tests.tiny import tiny_inputs, tiny_model

STEPS, SETTINGS = 4, dict(schedule="constant", lr=1e-2, log_every=1)


def data(model):
    """Batches with different numbers of labels; of two ranks each takes every second one."""
    return [tiny_inputs(model, batch=2, seed=seed, padded=seed % 2 == 0) for seed in range(8)]


def train(share=None, **options):
    base = tiny_model("gpt2", layers=1)
    base.config.resid_pdrop = base.config.embd_pdrop = base.config.attn_pdrop = 0.0  # the student is built from it
    model, proj = projector(model=base, share=share)
    # without the noise that keys' biases have for a gradient
    ff.finetune(proj.student, data(model), STEPS, optimizer=proj.optimizer(eps=1e-4), **SETTINGS, **options)
    return proj


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for share in (None, "residual_stream"):
        save_file(weights(train(share).student), f"{folder}/{share}-{rank}.safetensors")
    model = tiny_model("gpt2", layers=1)
    found = ff.importance(model, data(model)[rank::2])
    save_file(found.scores, f"{folder}/scores-{rank}.safetensors")
    torch.distributed.destroy_process_group()
