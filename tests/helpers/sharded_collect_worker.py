"""One rank of a job that collects from a model that FSDP2 has sharded, and shares out the assignments."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ffmerge_fast as ff
from tests.helpers.tiny_models import tiny_inputs, tiny_model


def batches(model):
    return [tiny_inputs(model, seed=seed) for seed in range(4)]


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny_model("llama").eval()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    stats = ff.collect(model, batches(model)[rank::2], window=3, max_tokens=1000)
    plan = ff.plan(stats, window=3, model=model, over_ranks=True)
    assert len(stats._alignments) == 4  # this rank solved two of them, and has all
    try:
        ff.merge_(model, plan)
    except ff.FFMergeError as error:
        assert "merge before fully_shard, or write the plan" in str(error)
    else:
        raise AssertionError("a sharded model was merged")
    if rank == 0:
        stats.save(folder / "stats")
        torch.save(plan.to_dict(), folder / "plan")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
