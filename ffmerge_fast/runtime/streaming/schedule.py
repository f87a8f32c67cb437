"""Forward passes of a streamed model: before a block runs its weights take their places, the ones before it go."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...support.errors import FFMergeError
from .loader import Loader
from .plan import BlockWeights, Weight, total


class ParameterSlots:
    """Parameters that hold a loaded weight, or NaN; nobody else may change them."""

    def __init__(self, device: torch.device):
        self._device = device
        self._blank: dict[torch.dtype, Tensor] = {}
        self._seen: dict[nn.Parameter, tuple[int, int]] = {}  # version and address that we left it with

    def fill(self, weight: Weight, value: Tensor) -> None:
        self.check_untouched(weight)
        for parameter in weight.parameters:
            self._put(parameter, value)

    def clear(self, weight: Weight) -> None:
        self.check_untouched(weight)
        for parameter in weight.parameters:
            self._put(parameter, self.blank_like(parameter))

    def blank_like(self, parameter: Tensor) -> Tensor:
        """NaN of the parameter's shape, in the memory of one value."""
        if parameter.dtype not in self._blank:
            self._blank[parameter.dtype] = torch.full((), torch.nan, dtype=parameter.dtype, device=self._device)
        return self._blank[parameter.dtype].expand(parameter.shape)

    def _put(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.data = value
        self._seen[parameter] = parameter._version, parameter.data_ptr()

    def check_untouched(self, weight: Weight) -> None:
        """Raise FFMergeError if a parameter was changed, moved or converted since it was filled or cleared."""
        for p in weight.parameters:
            if self._seen.get(p, (p._version, p.data_ptr())) != (p._version, p.data_ptr()):
                raise FFMergeError(
                    f"stream_: {weight.names[0]} was changed while it is streamed, which is lost; call "
                    "unstream_(model) before changing, moving or converting weights"
                )


class StreamSchedule:
    """Decides, block by block, what is waited for, let go of and sent for.

    Args:
        parcels: all that are streamed.
        following: {step: steps that may come after it}, see `following_steps`.
        room: bytes for them on the device.
    """

    def __init__(
        self,
        parcels: list[BlockWeights],
        following: dict[int, set[int]],
        room: int,
        loader: Loader,
        places: ParameterSlots,
    ):
        self._parcels, self._room, self._loader, self._places = parcels, room, loader, places
        self._needed = {step: [p for p in parcels if step in p.steps] for step in following}
        self._next = {step: step + 1 if step + 1 in afters else max(afters) for step, afters in following.items()}
        self._step: int | None = None  # the block that began last
        self._held: dict[BlockWeights, list[Tensor]] = {}

    def enter(self, step: int) -> None:
        """Before a block runs."""
        if self._missing(step):
            self._receive()
        for parcel in [parcel for parcel in self._held if not parcel.alive(step)]:
            self._release(parcel)
        if missing := self._missing(step):
            self._loader.send_for(missing)
            self._receive()
        if self._step is not None:
            self._next[self._step] = step  # what came after it this time is what is expected next time
        self._step = step
        self._send_ahead(step)

    def _send_ahead(self, step: int) -> None:
        """Send for what the next block that misses anything misses, as soon as there is room for it."""
        if self._loader.pending:
            return
        for _ in self._next:
            step = self._next[step]
            if coming := self._missing(step):
                if total(self._held) + total(coming) <= self._room:
                    self._loader.send_for(coming)
                return

    def _missing(self, step: int) -> list[BlockWeights]:
        return [parcel for parcel in self._needed[step] if parcel not in self._held]

    def _receive(self) -> None:
        for parcel, values in self._loader.receive().items():
            self._held[parcel] = values
            for weight, value in zip(parcel.weights, values, strict=True):
                self._places.fill(weight, value)

    def _release(self, parcel: BlockWeights) -> None:
        values = self._held.pop(parcel)
        for weight in parcel.weights:
            self._places.clear(weight)
        self._loader.let_go(values)

    def forget(self) -> None:
        """Drop all values; the parameters that hold them are somebody else's from now on."""
        self._held.clear()
