"""Where the frozen base weights lie while a student is trained, and how they come to its device, a few at a time."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._errors import FFMergeError
from .units import Unit

PLACES = (None, "cpu", "disk")
_ALIGNMENT = 64  # of what torch allocates on a CPU, in bytes
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class BaseWeights:
    """The base weights of some units; `stream` fetches those of the next ones while some are worked on.

    Args:
        units: of this process. Those in memory are kept; those read from disk are let go of (`weight` on "meta").
        place: None: they stay where they are. "cpu": in host memory, pinned if the student is on CUDA; what lies there
            already is not copied. "disk": in safetensors files; read in place from a folder that holds the same
            values, the rest is written.
        folders: where to look for such files; the last one is also where they are written.
            None as the last: a temporary folder, which is removed with this object.

    Attributes:
        offloaded: whether there is a place, so that memory is short.

    Raises:
        FFMergeError: an unknown place; a file cannot be written; weights that were let go of by another optimiser.
    """

    def __init__(self, units: Sequence[Unit], place: str | None, folders: Sequence[str | os.PathLike | None] = (None,)):
        if place not in PLACES:
            raise FFMergeError(f"offload_base: got {place!r}, wanted None, 'cpu' or 'disk'")
        matrices = [m for unit in units for m in unit.matrices]
        if any(m.weight.is_meta for m in matrices):
            raise FFMergeError(
                "optimizer: another one of this projector has offloaded the base's weights; project again"
            )
        self._device = next((m.parameter.device for m in matrices), torch.device("cpu"))
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "ffmerge-base")
        self._entries: dict[str, _Entry] = {}
        self._host: dict[str, Tensor] = {}
        weights = {m.name: m.weight for m in matrices}
        if place == "disk":
            self._entries = self._on_disk(weights, folders)
        else:
            self._host = _in_host_memory(weights, pin=self._side is not None) if place == "cpu" else weights
        self.offloaded = place is not None
        self._fetches = place == "disk" or any(not self._usable(w) for w in self._host.values())

    def held(self) -> dict[str, Tensor]:
        """{matrix name: weight} of those in memory."""
        return self._host

    def check(self) -> None:
        """Raise FFMergeError if a file is no longer what it was."""
        for file in {entry.file for entry in self._entries.values()}:
            file.check()

    def stream(self, bunches: Iterable[list[Unit]]) -> Iterator[list[Unit]]:
        """The units with their base weights on the student's device; a bunch is good until the next is asked for."""
        if not self._fetches:
            yield from bunches
            return
        ahead: list[tuple[list[Unit], Future]] = []
        for units in bunches:
            ahead.append((units, self._pool.submit(self._fetch, units)))
            if len(ahead) > 1:
                yield from self._lent(*ahead.pop(0))
        for entry in ahead:
            yield from self._lent(*entry)

    def _lent(self, units: list[Unit], fetched: Future) -> Iterator[list[Unit]]:
        weights, event = fetched.result()
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            for weight in weights.values():
                weight.record_stream(current)
        units = [unit.on(weights=weights) for unit in units]
        del weights, fetched
        yield units
        for unit in units:
            unit.matrices.clear()  # so that no more than two bunches are in memory, whoever still holds this one

    def _usable(self, weight: Tensor) -> bool:
        """Whether it need not be copied: it is on the student's device, and there where torch would have put it. One
        that was loaded from a file may lie at any address, and a product rounds by how its factors are aligned."""
        return weight.device == self._device and (not weight.is_cpu or weight.data_ptr() % _ALIGNMENT == 0)

    def _fetch(self, units: list[Unit]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Runs in a thread of its own, with a CUDA stream of its own."""
        found = {m.name: self._read(m.name) for unit in units for m in unit.matrices}
        if self._side is None:
            return {n: w if self._usable(w) else w.to(self._device, copy=True) for n, w in found.items()}, None
        with torch.cuda.stream(self._side):
            found = {name: w.to(self._device, non_blocking=True) for name, w in found.items()}
        return found, self._side.record_event()

    def _read(self, name: str) -> Tensor:
        return self._host[name] if name in self._host else self._entries[name].read(self._side is not None)

    def _on_disk(self, weights: dict[str, Tensor], folders: Sequence[str | os.PathLike | None]) -> dict[str, _Entry]:
        found: dict[str, _Entry] = {}
        for folder in folders:
            if folder is not None:
                entries = _entries_of(Path(folder))
                found |= _matching({n: w for n, w in weights.items() if n not in found}, entries)
        missing = {name: weight for name, weight in weights.items() if name not in found}
        if missing:
            folder = folders[-1]
            if folder is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="ffmerge-base-")
                folder = self._temporary.name
            found |= _matching(missing, _write(missing, Path(folder)))
        return found


@dataclass(frozen=True)
class _File:
    """A safetensors file and what it was when it was opened first."""

    path: Path
    identity: tuple[int, ...]

    def check(self, now: os.stat_result | None = None) -> None:
        try:
            now = os.stat(self.path) if now is None else now
        except OSError as error:
            raise FFMergeError(self._told(f"cannot be read any more ({error.strerror})")) from error
        if _identity(now) != self.identity:
            raise FFMergeError(self._told("was changed"))

    def _told(self, what: str) -> str:
        return f"offload_base: {self.path}, which holds weights of the base, {what}; put it back and resume the run"


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class _Entry:
    """One tensor of a file."""

    file: _File
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, pin: bool = False) -> Tensor:
        """The tensor in memory of its own: a map of the file would be a crash when that is cut short."""
        tensor = torch.empty(self.shape, dtype=self.dtype, pin_memory=pin)
        try:
            with open(self.file.path, "rb", buffering=0) as file:
                file.seek(self.offset)
                left = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                while left and (count := file.readinto(left)):
                    left = left[count:]
                self.file.check(os.fstat(file.fileno()))  # after reading: that is what was read
        except OSError:
            self.file.check()
            raise
        return tensor


def _entries_of(folder: Path) -> dict[str, _Entry]:
    """{name: entry} of all tensors in the safetensors files of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or none of ours
            with open(path, "rb") as raw:
                file = _File(path, _identity(os.fstat(raw.fileno())))
                size = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(min(size, 10**8)))
            for name, entry in header.items():
                if name != "__metadata__" and entry["dtype"] in _DTYPES:
                    shape, offset = tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
                    found[name] = _Entry(file, offset, _DTYPES[entry["dtype"]], shape)
    return found


def _matching(weights: dict[str, Tensor], entries: dict[str, _Entry]) -> dict[str, _Entry]:
    """The entries that hold just these weights, under their own name, without the base model's prefix, or under the
    name of another weight that is the same tensor."""
    found: dict[str, _Entry] = {}
    names: dict[tuple, list[str]] = {}
    for name, weight in weights.items():
        names.setdefault(_memory(weight), []).append(name)
    for same in names.values():
        weight = weights[same[0]]
        for candidate in [form for name in same for form in (name, name.partition(".")[2])]:
            entry = entries.get(candidate)
            alike = entry is not None and (entry.dtype, entry.shape) == (weight.dtype, tuple(weight.shape))
            if alike and torch.equal(entry.read(), weight.cpu()):
                found |= dict.fromkeys(same, entry)
                break
    return found


def _write(weights: dict[str, Tensor], folder: Path) -> dict[str, _Entry]:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    once = {_memory(weight): name for name, weight in reversed(weights.items())}
    path = folder / f"base-{uuid.uuid4().hex[:8]}.safetensors"
    beside = path.with_name(f".{path.name}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weights[name].detach().cpu().contiguous() for name in once.values()}, beside)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise FFMergeError(f"offload_base: {path} cannot be written ({error}); give another offload_dir") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
    return _entries_of(folder)


def _in_host_memory(weights: dict[str, Tensor], pin: bool) -> dict[str, Tensor]:
    moved: dict[tuple, Tensor] = {}
    for weight in weights.values():
        if _memory(weight) not in moved:
            moved[_memory(weight)] = weight.cpu().pin_memory() if pin else weight.cpu()
    return {name: moved[_memory(weight)] for name, weight in weights.items()}


def _memory(tensor: Tensor) -> tuple:
    """Equal for tensors that are one."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
