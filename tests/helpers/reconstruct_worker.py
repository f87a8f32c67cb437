"""One of two ranks that reconstruct students together, each on batches of its own. Usage: RANK FOLDER."""

import sys
from pathlib import Path

import torch

from tests.helpers.projecting import projector, weights
from tests.helpers.tiny_models import tiny_inputs, tiny_model

NAMES = ("gpt2", "marian")


def fitted(name, rank, world):
    model = tiny_model(name, layers=1).double()
    _, proj = projector(model=model, d_model=8, d_ff=16, init="svd")
    batches = [tiny_inputs(model, batch=8, seed=seed, padded=True) for seed in range(rank, 5, world)]
    proj.reconstruct_(batches, local_steps=0)
    return proj.student


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in NAMES:
        torch.save(weights(fitted(name, rank, 2)), folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
