"""One of two ranks that train a student together, each on data of its own; started by test_distributed.py.

Usage: RANK FOLDER.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import ffmerge_fast as ff
from ffmerge_fast.driver.training.state import gathered
from ffmerge_fast.projecting.optimizer import adamw, ownership
from tests.helpers.projecting import projector
from tests.helpers.tiny_models import tiny_inputs, tiny_model

STEPS, SETTINGS = 4, dict(schedule="constant", lr=1e-2, log_every=1)
RUNS = {  # name: options of project, of its optimizer, of finetune
    "plain": ({}, {}, {}),
    "one unit": (dict(share="residual_stream"), {}, {}),
    "clipped": (dict(share="qkv"), dict(max_grad_norm=0.05, weight_decay=0.1), {}),
    "8bit": ({}, dict(state="8bit"), {}),
    "from disk": ({}, dict(offload_base="disk"), {}),
    "not distributed": ({}, dict(distribute=False), {}),
    "fsdp2": ({}, {}, dict(parallel="fsdp2")),
    "fsdp2 clipped": (dict(share="qkv"), dict(max_grad_norm=0.05, weight_decay=0.1), dict(parallel="fsdp2")),
    "bfloat16": ({}, {}, {}),
}


def set_up():
    """Everything is small here: 8-bit moments and several buckets nonetheless."""
    adamw.MIN_8BIT, ownership._BUCKET_BYTES = 64, 1024


def base_model(dropout=0.0, dtype=torch.float32):
    model = tiny_model("gpt2", layers=1).to(dtype)
    config = model.config  # the student is built from it
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    return model


def data(model):
    """Batches with different numbers of labels; of two ranks each takes every second one."""
    return [tiny_inputs(model, batch=2, seed=seed, padded=seed % 2 == 0) for seed in range(8)]


def make(name, dropout=0.0):
    """(base, projector, function that makes its optimiser)."""
    options, of_optimizer, _ = RUNS[name]
    base = base_model(dropout, torch.bfloat16 if name == "bfloat16" else torch.float32)
    model, proj = projector(model=base, **options)
    # without the noise that keys' biases have for a gradient
    return model, proj, lambda: proj.optimizer(eps=1e-4, **of_optimizer)


def train(name, steps=STEPS, dropout=0.0, **options):
    """(projector, optimiser) of a run with `finetune`."""
    model, proj, make_optimizer = make(name, dropout)
    made = []

    def once():
        made.append(make_optimizer())
        return made[0]

    if torch.distributed.is_initialized():
        options = RUNS[name][2] | options
    ff.finetune(proj.student, data(model), steps, optimizer=once, **SETTINGS | options)
    assert made[0]._sharded == (options.get("parallel") == "fsdp2")
    if "offload_base" in RUNS[name][1]:  # also of the units of other ranks
        assert all(m.weight.is_meta for unit in made[0]._owners.owner for m in unit.matrices)
    return proj, made[0]


def nbytes(optimizer):
    return sum(t.nbytes for entries in optimizer.state.values() for t in entries.values())


def _states(rank, folder):
    """A state of two ranks for one process, and one of one process for two ranks."""
    proj, optimizer = train("8bit")
    try:
        optimizer.state_dict()
    except ff.FFMergeError as error:
        (folder / f"refused-{rank}").write_text(str(error))
    optimizer.consolidate_state_dict()
    if rank == 0:
        torch.save(optimizer.state_dict(), folder / "state-of-two")
    (folder / f"bytes-{rank}").write_text(str(nbytes(optimizer)))
    _, proj, make_optimizer = make("8bit")
    plain = torch.load(folder / "plain-of-one")
    proj.student.load_state_dict(plain, strict=False)
    optimizer = make_optimizer()
    optimizer.load_state_dict(torch.load(folder / "state-of-one"))
    _save(folder / f"loaded-{rank}.safetensors", proj.student)


def _resumed(rank, folder):
    for name in ("plain", "8bit", "fsdp2"):
        run = folder / f"run {name}"
        for steps in (2, STEPS):
            proj, _ = train(name, steps, dropout=0.2, output_dir=run)
        _save(folder / f"resumed {name}-{rank}.safetensors", proj.student)
        proj, _ = train(name, dropout=0.2)
        _save(folder / f"whole {name}-{rank}.safetensors", proj.student)
        folded = proj.fold()  # also of a sharded student
        if rank == 0:
            folded.save_pretrained(folder / f"folded {name}")


def _save(file, student):
    save_file(gathered(dict(student.named_parameters())), file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    set_up()
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in RUNS:
        _save(folder / f"{name}-{rank}.safetensors", train(name)[0].student)
    _states(rank, folder)
    _resumed(rank, folder)
    model = tiny_model("gpt2", layers=1)
    found = ff.importance(model, data(model)[rank::2])
    save_file(found.scores, folder / f"scores-{rank}.safetensors")
    torch.distributed.destroy_process_group()
