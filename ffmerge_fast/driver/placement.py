"""Where a model's weights are while passes run over calibration data: planned within a budget before any are loaded."""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.sublayers import find_ffns
from ..runtime.streaming.plan import Steps, total
from ..support.errors import FFMergeError
from ..support.machine import free_memory, give_back_freed_memory
from ..support.sizes import format_bytes

_SHARE = 0.95  # of free memory that may be planned with
_SECONDS = 0.1  # that a rate is measured for


@dataclass(frozen=True)
class ModelSize:
    """What a model's weights take, known without their values.

    Attributes:
        layers: blocks.
        least, smooth: bytes on the device that streaming needs for one block at a time, and to load the next meanwhile.
        average: bytes that averaging the largest matrix of an FFN takes, one layer after the other.
        token: bytes of one token's features in a block: its stream, its FFN, its attention.
    """

    parameters: int
    nbytes: int
    layers: int
    least: int
    smooth: int
    average: int
    token: int

    @classmethod
    def of(cls, model: nn.Module) -> ModelSize:
        """Of a model that may be on "meta"."""
        ffns, steps = find_ffns(model), Steps.of(model)
        widest = max(ffns, key=lambda ffn: ffn.d_ff)
        itemsize = next(model.parameters()).element_size()
        return cls(
            parameters=sum(weight.numel() for weight in model.parameters()),
            nbytes=steps.fixed + total(steps.parcels),
            layers=len(ffns),
            least=steps.least(ahead=False),
            smooth=steps.least(),
            average=widest.d_model * widest.d_ff * (2 * itemsize + 8),  # a layer's, permuted, in float32; the mean
            token=(6 * widest.d_model + 4 * widest.d_ff) * itemsize + 4 * widest.d_ff,
        )


@dataclass(frozen=True)
class Work:
    """What a command keeps beside the weights.

    Attributes:
        sums: bytes that do not depend on the batch, on the device.
        kept: bytes outside of the device: on the host if it has room, else on disk.
        tokens: that all passes together count; at most.
        length: tokens of one example.
        batch_size: examples at once, at most; 0: nothing runs.
        files: the model is written from folder to folder, and run block by block once.
        trains: all weights are needed at once, and the features of all blocks.
        token: bytes of each token of a batch, beside those of a block: logits, features that wait.
    """

    sums: int = 0
    kept: int = 0
    tokens: int = 0
    length: int = 1
    batch_size: int = 1
    files: bool = False
    trains: bool = False
    token: int = 0


@dataclass(frozen=True)
class Placement:
    """A way to hold a model, and what it takes. Prints as a line.

    Attributes:
        way: "whole" on one device, "spread" over several, "stream": block by block, or "files": from folder to folder.
        weights: where streamed weights lie, "host" or "disk".
        budget: bytes of weights on the device.
        batch_size: examples at once.
        on_device, on_host, on_disk: bytes, at their most.
        seconds: expected, of the passes; None where that is not known.
    """

    way: str
    device: str
    weights: str
    budget: int
    batch_size: int
    on_device: int
    on_host: int
    on_disk: int
    size: ModelSize
    seconds: float | None = None

    def values(self) -> dict[str, Any]:
        """In figures, for machines."""
        return {
            "way": self.way, "device": self.device, "parameters": self.size.parameters, "bytes": self.size.nbytes,
            "budget": self.budget, "batch_size": self.batch_size, "device_bytes": self.on_device,
            "host_bytes": self.on_host, "disk_bytes": self.on_disk, "seconds": self.seconds,
        }  # fmt: skip

    def __str__(self) -> str:
        way = {
            "whole": f"whole on {self.device}",
            "spread": "spread over the GPUs",
            "stream": f"block by block on {self.device}, weights from {self.weights}",
            "files": "from folder to folder",
        }[self.way]
        takes = f"{format_bytes(self.on_device)} on the device, {format_bytes(self.on_host)} on the host"
        disk = f", {format_bytes(self.on_disk)} on disk" if self.on_disk else ""
        examples = f", {self.batch_size} examples at once" if self.batch_size else ""
        minutes = "" if self.seconds is None else f"; about {max(1, round(self.seconds / 60))} min"
        return (
            f"{self.size.parameters:,} parameters ({format_bytes(self.size.nbytes)}) {way}: {takes}{disk}{examples}"
            f"{minutes}"
        )


@dataclass(frozen=True)
class Machine:
    """What there is to plan with, in bytes and per second.

    Attributes:
        device_memory, host_memory: free; one and the same on the CPU.
        devices: free memory of all CUDA devices together.
        flops: of the device, in the model's dtype; None: not known.
        reads, link: bytes from disk, and from the host to a GPU.
    """

    device: str
    device_memory: int
    host_memory: int
    devices: int = 0
    flops: float | None = None
    reads: float = 1e9
    link: float = 2e10

    @classmethod
    def here(cls, device: str) -> Machine:
        """This machine, its rates measured in a moment."""
        host = free_memory(torch.device("cpu")) or 1 << 62
        on = torch.device(device)
        if on.type != "cuda":
            return cls(device, host, host, 0, _flops(on))
        free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
        return cls(device, free_memory(on) or 0, host, sum(free), _flops(on))


def place(
    size: ModelSize,
    work: Work,
    machine: Machine,
    wanted: str = "auto",
    budget: int | None = None,
    host_memory: int | None = None,
) -> Placement:
    """Choose how to hold a model: whole if it fits, over all GPUs if they hold it, else block by block.

    Args:
        wanted: "auto", "stream", or "cpu" and "cuda": whole, whatever it takes.
        budget: bytes on the device for all that the work takes there; default what is free.
        host_memory: bytes on the host; default what is free.

    Raises:
        FFMergeError: the budget does not do, with the smallest that does.
    """
    room = int(machine.device_memory * _SHARE) if budget is None else budget
    host = int(machine.host_memory * _SHARE) if host_memory is None else host_memory
    on_cpu = not machine.device.startswith("cuda")
    room = min(room, host) if on_cpu else room
    example = work.length * (size.token * (size.layers if work.trains else 1) + work.token)
    everything = size.nbytes + work.sums + work.batch_size * example

    def made(way: str, weights: str, budget: int) -> Placement:
        device = (size.nbytes if way != "stream" else budget) + work.sums + work.batch_size * example
        staging = min(size.nbytes, size.smooth) if way == "stream" else 0
        held = size.nbytes if weights == "host" and way == "stream" else staging
        of_host = device if on_cpu else held
        in_files = 0 if of_host + work.kept <= host and not on_cpu else work.kept
        of_host += work.kept - in_files
        passes = max(1, -(-work.tokens // max(1, work.length * work.batch_size)))
        again = passes - 1 if way == "stream" else 0
        reading = size.nbytes * (1 / machine.reads + again / (machine.link if weights == "host" else machine.reads))
        seconds = None
        if machine.flops and work.batch_size:
            seconds = max(2 * size.parameters * work.tokens / machine.flops, reading)
        takes = (device, of_host, in_files)
        return Placement(way, machine.device, weights, budget, work.batch_size, *takes, size, seconds)

    if work.files and wanted in ("auto", "stream"):
        return _of_files(size, machine, min(host, room) if on_cpu else host)
    if work.trains:
        return _to_train(made("whole", "host", size.nbytes), wanted, budget, room)
    if wanted in ("cpu", "cuda") or (wanted == "auto" and everything <= room):
        if budget is not None and everything > room:
            raise _too_small("budget", room, size, work, f"all weights are to be on {machine.device}")
        return made("whole", "host", size.nbytes)
    if wanted == "auto" and budget is None and not on_cpu and everything <= machine.devices * _SHARE:
        return made("spread", "host", size.nbytes)
    weights = "host" if not on_cpu and size.nbytes <= host else "disk"
    left = room - work.sums - work.batch_size * example
    if left >= size.least:
        return made("stream", weights, min(left, size.nbytes))
    raise _too_small("budget", room, size, work, "one block at a time")


def _of_files(size: ModelSize, machine: Machine, room: int) -> Placement:
    """From folder to folder: an average is computed when it is written, and a pass gives the reference logits."""
    takes = max(size.smooth, size.average)
    if takes > room:
        raise FFMergeError(
            f"budget: {format_bytes(room)} may be used, but writing takes {takes} bytes: {format_bytes(size.average)} "
            f"for one average, then {format_bytes(size.smooth)} for two blocks and what is outside of the blocks"
        )
    seconds = 2 * size.nbytes / machine.reads
    return Placement("files", "cpu", "disk", takes, 0, takes, takes, size.nbytes, size, seconds)


def _to_train(found: Placement, wanted: str, budget: int | None, room: int) -> Placement:
    """The whole model; a budget that is too small is an error, memory that seems to be a warning."""
    if wanted == "stream":
        raise FFMergeError("place: got stream, but training needs all weights at once; give cpu or cuda")
    if found.on_device > room:
        takes = (
            f"training takes about {found.on_device} bytes ({format_bytes(found.on_device)}) and "
            f"{format_bytes(room)} may be used; give a smaller --batch-size or --max-length (project: --state 8bit)"
        )
        if budget is not None:
            raise FFMergeError(f"budget: {takes}")
        warnings.warn(takes, stacklevel=3)
    return found


def _too_small(argument: str, room: int, size: ModelSize, work: Work, what: str) -> FFMergeError:
    batch = work.batch_size * work.length * (size.token + work.token)
    need = size.least + work.sums + batch
    smaller = ", or a smaller --batch-size or --max-length" if batch else ""
    sums = ", or --max-memory for sums on disk" if work.sums > size.least else ""
    return FFMergeError(
        f"{argument}: {format_bytes(room)} may be used and {what}; block by block it takes at least {need} bytes: "
        f"{format_bytes(size.least)} for the largest block and what is outside of the blocks, "
        f"{format_bytes(work.sums)} of sums and {format_bytes(batch)} for {work.batch_size} examples of {work.length} "
        f"tokens; give --place stream --budget {-(-need // 2**20)}MiB{smaller}{sums}"
    )


def load(
    folder: str, placement: Placement, on_disk: Callable[[], nn.Module | None], options: Mapping[str, Any]
) -> nn.Module:
    """The model in a folder, held as was planned.

    Args:
        on_disk: gives it with its weights in the files.
        options: of `from_pretrained`.

    Raises:
        FFMergeError: it cannot be streamed (its files do not hold its weights as such); as `from_pretrained`.
    """
    from ..checkpoint.folder import from_pretrained
    from ..runtime.streaming.stream import stream_

    if placement.on_disk:
        _check_disk(placement.on_disk)
    if placement.way == "stream":
        give_back_freed_memory()
        model = on_disk()
        stream_(model, placement.device, placement.weights, placement.budget)
        return model
    if placement.way == "spread":
        return from_pretrained(folder, device_map="auto", **options)
    return from_pretrained(folder, **options).to(placement.device)


def _check_disk(nbytes: int) -> None:
    """Raise FFMergeError unless the folder for temporary files has room for so many bytes."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if nbytes > free:
        raise FFMergeError(
            f"TMPDIR: {format_bytes(nbytes)} will be kept in {tempfile.gettempdir()}, {format_bytes(free)} are free "
            "there; set it to a folder on a larger disk"
        )


def _flops(device: torch.device) -> float:
    """Of a square product, in float32 on the CPU and bfloat16 on a GPU."""
    n, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device=device)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        a @ a
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 2 * n**3 * count / (time.perf_counter() - started)
