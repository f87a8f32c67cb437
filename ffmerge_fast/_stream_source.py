"""Where the weights of a streamed model lie, in host memory or on disk, and how they come to the device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ._errors import FFMergeError
from ._stream_plan import Weight
from ._weight_files import Reader, WeightEntry, entries_of, matching, write

PLACES = ("host", "disk")
_READER = Reader("stream_", "weights of the model", "put it back, or load the model again", "TMPDIR")


class Source:
    """Copies of weights outside of the device.

    Args:
        fixed: weights that stay on the device; of them only those on "meta" are looked for.
        streamed: weights to be loaded again and again.
        place: "host" or "disk", see `stream_`.
        device: where `load` brings them.
        folder: of safetensors files that may hold them, or None.

    Raises:
        FFMergeError: a weight on "meta" that is not in the folder; the temporary file cannot be written.
    """

    def __init__(
        self,
        fixed: Sequence[Weight],
        streamed: Sequence[Weight],
        place: str,
        device: torch.device,
        folder: str | os.PathLike | None,
    ):
        self._place, self._device, self._pin = place, device, device.type == "cuda"
        self._host: dict[Weight, Tensor] = {}
        self._temporary: tempfile.TemporaryDirectory | None = None
        wanted = [w for w in fixed if w.is_meta] + [w for w in streamed if w.is_meta or place == "disk"]
        self._entries = self._find(wanted, folder) if wanted else {}

    def _find(self, wanted: Sequence[Weight], folder: str | os.PathLike | None) -> dict[str, WeightEntry]:
        named = {name: weight.parameters[0] for weight in wanted for name in weight.names}
        found = matching(named, entries_of(Path(folder), _READER)) if folder else {}
        missing = {name: tensor for name, tensor in named.items() if name not in found}
        if meta := [name for name, tensor in missing.items() if tensor.is_meta]:
            where = f"{folder} does not hold it" if folder else "the model has no folder"
            raise FFMergeError(f"stream_: {meta[0]} is on meta and {where}; give folder= with its safetensors files")
        if missing:
            self._temporary = tempfile.TemporaryDirectory(prefix="ffmerge-stream-")
            found |= matching(missing, write(missing, Path(self._temporary.name), "weights", _READER))
        if unequal := [name for name in named if name not in found]:
            raise FFMergeError(f"stream_: {unequal[0]} holds NaN, wanted numbers: repair the model")
        return found

    def keep(self, weight: Weight) -> None:
        """Called before the weight's own memory is let go of."""
        if self._place == "host":
            value = self.value(weight).cpu()
            self._host[weight] = value.pin_memory() if self._pin else value

    def value(self, weight: Weight) -> Tensor:
        """The weight in host memory, or where it is before it was let go of."""
        if weight in self._host:
            return self._host[weight]
        entry = self._entries.get(weight.names[0])
        return weight.parameters[0].data if entry is None else entry.read()

    def load(self, weight: Weight) -> Tensor:
        """The weight on the device, in memory of its own; on CUDA as far as the current stream has come."""
        if weight in self._host:
            return self._host[weight].to(self._device, non_blocking=True, copy=True)
        return self._entries[weight.names[0]].read(self._pin).to(self._device, non_blocking=True)

    def close(self) -> None:
        """Remove the temporary file, if there is one."""
        if self._temporary is not None:
            self._temporary.cleanup()
