"""One of two processes that train accelerated tied models on data of their own; writes what it found to <rank>.pt."""

import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import ffmerge_fast as ff
from ffmerge_fast.integrations.fsdp2 import copy_whole_, shard_
from tests.helpers.tiny_models import accelerate_, tiny_inputs, tiny_model

# What is tied. The weights of gpt2 are kept transposed; of marian, layers compute the FFNs and share their projections.
FAMILIES = {"gpt2": "1-2", "llama": "0-2", "marian": "encoder:1-3,decoder:0-1"}
STEPS = 3
DDP = {
    "plain": {},
    "bucket views": dict(gradient_as_bucket_view=True),
    "unused": dict(find_unused_parameters=True),
    "static": dict(static_graph=True),
    "static views": dict(static_graph=True, gradient_as_bucket_view=True),
}
FSDP = {"fp32": {}, "bf16": dict(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))}


def tied(family, layers=4):
    return ff.tie_without_average(tiny_model(family, layers), FAMILIES[family])


def batch(model, step, part):
    return tiny_inputs(model, batch=2, length=8, seed=100 * step + part)


def train(model, step_loss, synchronised, keep=False, checkpointed=False):
    """Three steps of two micro-batches each; {name: gradient} of the first step."""
    if checkpointed:
        (model.module if hasattr(model, "module") else model).gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = {}
    for step in range(STEPS):
        for micro in range(2):
            with synchronised(micro == 1):
                step_loss(model, step, micro).backward()
        if step == 0:
            first = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keep)
    return {name.removeprefix("module."): gradient for name, gradient in first.items()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def without_dropout(model):
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def on_this_rank(rank):
    return lambda model, step, micro: model(**batch(getattr(model, "module", model), step, 2 * rank + micro)).loss


def ddp(family, rank, options, accelerate=True, **settings):
    model = without_dropout(tied(family))
    wrapped = DistributedDataParallel(accelerate_(model) if accelerate else model, **options)
    every = nullcontext if options.get("static_graph") else wrapped.no_sync
    gradients = train(wrapped, on_this_rank(rank), lambda last: nullcontext() if last else every(), **settings)
    return gradients, dict(model.named_parameters())


def fsdp(family, rank, options, accelerate=True):
    model, copy = tied(family), tied(family)
    if accelerate:
        accelerate_(model)
    shard_(model, mesh=init_device_mesh("cpu", (2,)), **options)

    def synchronised(last):
        model.set_requires_gradient_sync(last)
        return nullcontext()

    with Reductions() as reductions:
        gradients = train(model, on_this_rank(rank), synchronised)
    return gradients, dict(copy_whole_(model, copy).named_parameters()), reductions.count


class Reductions(TorchDispatchMode):
    """Counts reduce-scatters."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.c10d._reduce_scatter_base_
        return function(*args, **kwargs or {})


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for family in FAMILIES:
        for name, options in DDP.items():
            found[family, "ddp", name] = ddp(family, rank, options)
        found[family, "ddp", "kept"] = ddp(family, rank, dict(gradient_as_bucket_view=True), keep=True)
        found[family, "ddp", "checkpointed"] = ddp(family, rank, {}, checkpointed=True)
        for name, options in FSDP.items():
            found[family, "fsdp2", name] = fsdp(family, rank, options)
            found[family, "fsdp2", f"{name} by autograd"] = fsdp(family, rank, options, accelerate=False)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
