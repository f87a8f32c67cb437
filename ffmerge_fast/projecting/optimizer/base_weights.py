"""Where the frozen base weights lie while a student is trained, and how they come to its device, a few at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ...support.errors import FFMergeError
from ...support.tensor_files import Reader, WeightEntry, entries_of, matching, memory, write
from ..matrices import Unit

_ALIGNMENT = 64  # of what torch allocates on a CPU, in bytes
_READER = Reader("offload_base", "weights of the base", "put it back and resume the run", "offload_dir")


class BaseWeights:
    """The base weights of some units; `stream` fetches those of the next ones while some are worked on.

    Args:
        units: of this process. Those in memory are kept; those read from disk are let go of (`weight` on "meta").
        place: None: they stay where they are. "host": in host memory, pinned if the student is on CUDA; what lies there
            already is not copied. "disk": in safetensors files; read in place from a folder that holds the same
            values, the rest is written.
        folders: where to look for such files; the last one is also where they are written.
            None as the last: a temporary folder, which is removed with this object.

    Attributes:
        offloaded: whether there is a place, so that memory is short.

    Raises:
        FFMergeError: a file cannot be written; weights that were let go of by another optimiser.
    """

    def __init__(self, units: Sequence[Unit], place: str | None, folders: Sequence[str | os.PathLike | None] = (None,)):
        matrices = [m for unit in units for m in unit.matrices]
        if any(m.weight.is_meta for m in matrices):
            raise FFMergeError(
                "optimizer: another one of this projector has offloaded the base's weights; project again"
            )
        self._device = next((m.parameter.device for m in matrices), torch.device("cpu"))
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "ffmerge-base")
        self._entries: dict[str, WeightEntry] = {}
        self._host: dict[str, Tensor] = {}
        weights = {m.name: m.weight for m in matrices}
        if place == "disk":
            self._entries = self._on_disk(weights, folders)
        else:
            self._host = _in_host_memory(weights, pin=self._side is not None) if place == "host" else weights
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

    def _on_disk(
        self, weights: dict[str, Tensor], folders: Sequence[str | os.PathLike | None]
    ) -> dict[str, WeightEntry]:
        found: dict[str, WeightEntry] = {}
        for folder in folders:
            if folder is not None:
                entries = entries_of(Path(folder), _READER)
                found |= matching({n: w for n, w in weights.items() if n not in found}, entries)
        missing = {name: weight for name, weight in weights.items() if name not in found}
        if missing:
            folder = folders[-1]
            if folder is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="ffmerge-base-")
                folder = self._temporary.name
            found |= matching(missing, write(missing, Path(folder), "base", _READER))
        return found


def _in_host_memory(weights: dict[str, Tensor], pin: bool) -> dict[str, Tensor]:
    moved: dict[tuple, Tensor] = {}
    for weight in weights.values():
        if memory(weight) not in moved:
            moved[memory(weight)] = weight.cpu().pin_memory() if pin else weight.cpu()
    return {name: moved[memory(weight)] for name, weight in weights.items()}
