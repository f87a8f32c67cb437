"""Weights in safetensors files: found by name and value, read one by one, written beside and renamed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import FFMergeError
from .files import WriteError, write_tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Reader:
    """Whose files these are, for the errors: the argument at fault, what they hold, what to do, where they may go."""

    argument: str
    holds: str
    remedy: str
    folder: str

    def lost(self, path: Path, what: str) -> FFMergeError:
        return FFMergeError(f"{self.argument}: {path}, which holds {self.holds}, {what}; {self.remedy}")


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file and what it was when it was opened first."""

    path: Path
    identity: tuple[int, ...]
    reader: Reader

    def check(self, now: os.stat_result | None = None) -> None:
        """Raise FFMergeError if the file is gone or is not what it was."""
        try:
            now = os.stat(self.path) if now is None else now
        except OSError as error:
            raise self.reader.lost(self.path, f"cannot be read any more ({error.strerror})") from error
        if _identity(now) != self.identity:
            raise self.reader.lost(self.path, "was changed")


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class WeightEntry:
    """One tensor of a file."""

    file: WeightFile
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, pin: bool = False) -> Tensor:
        """The tensor in memory of its own: a map of the file would be a crash when that is cut short."""
        tensor = torch.empty(self.shape, dtype=self.dtype, pin_memory=pin)
        read_into([(self, tensor)])
        return tensor


def chunks_of(entry: WeightEntry, nbytes: int = 1 << 24) -> Iterator[Tensor]:
    """The values of an entry, piece by piece, in memory that the next piece takes.

    Raises:
        FFMergeError: the file is gone or is not what it was.
    """
    piece = torch.empty(max(1, nbytes // entry.dtype.itemsize), dtype=entry.dtype)
    left, offset = math.prod(entry.shape), entry.offset
    while left:
        piece = piece[: min(left, len(piece))]
        read_into([(replace(entry, offset=offset), piece)])
        yield piece
        left, offset = left - len(piece), offset + piece.nbytes


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def read_into(pairs: Iterable[tuple[WeightEntry, Tensor]]) -> None:
    """Fill contiguous tensors on the CPU from their entries, each file once from front to back.

    Raises:
        FFMergeError: a file is gone or is not what it was.
    """
    ordered = sorted(pairs, key=lambda pair: (pair[0].file.path, pair[0].offset))
    for file, of_file in groupby(ordered, key=lambda pair: pair[0].file):
        try:
            with open(file.path, "rb", buffering=0) as raw:
                for entry, tensor in of_file:
                    raw.seek(entry.offset)
                    left = bytes_of(tensor)
                    while left and (count := raw.readinto(left)):
                        left = left[count:]
                file.check(os.fstat(raw.fileno()))  # after reading: that is what was read
        except OSError:
            file.check()
            raise


def entries_of(folder: Path, reader: Reader) -> dict[str, WeightEntry]:
    """{name: entry} of all tensors in the safetensors files of a folder."""
    return entries_in(sorted(folder.glob("*.safetensors")), reader)


def entries_in(paths: Iterable[Path], reader: Reader) -> dict[str, WeightEntry]:
    """{name: entry} of all tensors in these safetensors files; those that cannot be read are passed over."""
    found = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or none of ours
            with open(path, "rb") as raw:
                file = WeightFile(path, _identity(os.fstat(raw.fileno())), reader)
                size = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(min(size, 10**8)))
            for name, entry in header.items():
                if name != "__metadata__" and entry["dtype"] in DTYPES:
                    shape, offset = tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
                    found[name] = WeightEntry(file, offset, DTYPES[entry["dtype"]], shape)
    return found


def matching(weights: dict[str, Tensor], entries: dict[str, WeightEntry]) -> dict[str, WeightEntry]:
    """The entries that hold just these weights, under their own name, without the base model's prefix, or under the
    name of another weight that is the same tensor. Of a weight on "meta" only name, dtype and shape are compared."""
    found: dict[str, WeightEntry] = {}
    names: dict[tuple, list[str]] = {}
    for name, weight in weights.items():
        names.setdefault(memory(weight), []).append(name)
    for same in names.values():
        weight = weights[same[0]]
        for candidate in [form for name in same for form in (name, name.partition(".")[2])]:
            entry = entries.get(candidate)
            alike = entry is not None and (entry.dtype, entry.shape) == (weight.dtype, tuple(weight.shape))
            if alike and (weight.is_meta or torch.equal(entry.read(), weight.cpu())):
                found |= dict.fromkeys(same, entry)
                break
    return found


def write(weights: dict[str, Tensor], folder: Path, stem: str, reader: Reader) -> dict[str, WeightEntry]:
    """Write each weight once to a new file `<stem>-<random>.safetensors`, and give the entries of the whole folder.

    Raises:
        FFMergeError: the folder cannot be written, or its disk is full.
    """
    once = {memory(weight): name for name, weight in reversed(weights.items())}
    path = folder / f"{stem}-{uuid.uuid4().hex[:8]}.safetensors"
    try:
        write_tensors(path, {name: weights[name].detach().cpu().contiguous() for name in once.values()})
    except WriteError as error:
        raise FFMergeError(
            f"{reader.argument}: {path} cannot be written ({error.__cause__}); give another {reader.folder}"
        ) from error
    return entries_of(folder, reader)


def is_plain(tensor: Tensor) -> bool:
    """Whether its values are its memory; quantised and sharded tensors are classes of their own."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in DTYPES.values()


def memory(tensor: Tensor) -> tuple:
    """Equal for tensors that are one."""
    if tensor.is_meta or not is_plain(tensor):
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
