"""Where the weights of a streamed model lie, in host memory or on disk, and how they come to the device."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...models.elsewhere import Elsewhere, InFile
from ...support.errors import FFMergeError
from ...support.tensor_files import Reader, WeightEntry, entries_of, matching, read_into, write
from .plan import Weight

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
        places: where the values of weights on "meta" are, if that is known.

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
        places: Elsewhere | None = None,
    ):
        self._place, self._device, self._pin = place, device, device.type == "cuda"
        self._memory = _Pinned() if self._pin else _Recycled()
        self._host: dict[Weight, Tensor] = {}
        self._temporary: tempfile.TemporaryDirectory | None = None
        wanted = [w for w in fixed if w.is_meta] + [w for w in streamed if w.is_meta or place == "disk"]
        self._entries = self._find(wanted, folder, places) if wanted else {}

    def _find(
        self, wanted: Sequence[Weight], folder: str | os.PathLike | None, places: Elsewhere | None
    ) -> dict[str, WeightEntry]:
        named = {name: weight.parameters[0] for weight in wanted for name in weight.names}
        found, made = _placed(wanted, places) if places is not None else ({}, {})
        named |= made
        left = {name: tensor for name, tensor in named.items() if name not in found}
        found |= matching(left, entries_of(Path(folder), _READER)) if folder and left else {}
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

    def load(self, weights: Sequence[Weight]) -> list[Tensor]:
        """The weights on the device, in memory of their own; on CUDA as far as the current stream has come."""
        if self._place == "host" and self._pin:
            staged = [self._host[weight] for weight in weights]
        elif self._place == "host":
            staged = [self._memory.empty(weight).copy_(self._host[weight]) for weight in weights]
        else:
            staged = [self._memory.empty(weight) for weight in weights]
            read_into(zip((self._entries[weight.names[0]] for weight in weights), staged, strict=True))
        return [value.to(self._device, non_blocking=True) for value in staged]

    def close(self) -> None:
        """Let go of all memory, and remove the temporary file, if there is one."""
        self._host.clear()
        self._memory = None
        if self._temporary is not None:
            self._temporary.cleanup()


def _placed(wanted: Sequence[Weight], places: Elsewhere) -> tuple[dict[str, WeightEntry], dict[str, Tensor]]:
    """(entries of the weights on "meta" that files hold as they are, values of those that have to be computed)"""
    found, made = {}, {}
    for weight in wanted:
        place = places.place(weight.parameters[0])
        if isinstance(place, InFile) and place.as_it_is:
            found |= dict.fromkeys(weight.names, place.entry)
        elif place is not None:
            made |= dict.fromkeys(weight.names, place())
    return found, made


class _Pinned:
    """Memory for copies to a GPU; torch keeps it until they are done."""

    def empty(self, weight: Weight) -> Tensor:
        return torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)


class _Recycled:
    """Memory on the CPU that is lent again once no tensor lies in it: new pages cost as much as reading into them."""

    def __init__(self):
        self._lent: list[tuple[Tensor, weakref.ref]] = []

    def empty(self, weight: Weight) -> Tensor:
        """A tensor of any values. What is free and of another size is given back before more is taken."""
        free = (i for i, (memory, user) in enumerate(self._lent) if user() is None and memory.nbytes == weight.nbytes)
        if (place := next(free, None)) is not None:
            memory, _ = self._lent.pop(place)
        else:
            self._lent = [(memory, user) for memory, user in self._lent if user() is not None]
            memory = torch.empty(weight.nbytes, dtype=torch.uint8)
        user = memory.numpy()  # lives as long as a tensor of this memory
        self._lent.append((memory, weakref.ref(user)))
        return torch.from_numpy(user).view(weight.dtype).view(weight.shape)
