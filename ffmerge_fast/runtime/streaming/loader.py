"""Brings parcels of weights to the device in a thread of its own, while the device computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .plan import BlockWeights, total
from .source import Source


class Loader:
    """One load at a time: `send_for` begins it, `receive` waits for it.

    Attributes:
        pending: the parcels that were sent for and not received.
        read_bytes: received so far.
    """

    def __init__(self, source: Source, device: torch.device):
        self._source, self._device = source, device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "ffmerge-stream")
        self._ahead: Future | None = None
        self._leaving: list[Tensor] = []  # let go of, but the GPU may still compute with them
        self.pending: list[BlockWeights] = []
        self.read_bytes = 0

    def send_for(self, parcels: list[BlockWeights]) -> None:
        """Begin to load parcels, none of which is here or pending."""
        done = None if self._side is None else torch.cuda.current_stream(self._device).record_event()
        leaving, self._leaving = self._leaving, []
        self.pending = parcels
        self._ahead = self._pool.submit(self._fetch, parcels, leaving, done)

    def _fetch(self, parcels: list[BlockWeights], leaving: list[Tensor], done: torch.cuda.Event | None) -> tuple:
        """Runs in the thread, with a CUDA stream of its own. Memory is used again only after `done`."""
        if done is not None:
            done.synchronize()
        leaving.clear()
        with torch.cuda.stream(self._side):  # None: as it is
            loaded = self._source.load([weight for parcel in parcels for weight in parcel.weights])
        return loaded, None if self._side is None else self._side.record_event()

    def receive(self) -> dict[BlockWeights, list[Tensor]]:
        """Wait for what was sent for, if anything: {parcel: values of its weights}."""
        ahead, parcels = self._ahead, self.pending
        self._ahead, self.pending = None, []
        if ahead is None:
            return {}
        loaded, event = ahead.result()
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        self.read_bytes += total(parcels)
        values = iter(loaded)
        return {parcel: [next(values) for _ in parcel.weights] for parcel in parcels}

    def wait(self) -> None:
        """Until what was sent for has come or failed, which `receive` tells."""
        if self._ahead is not None:
            self._ahead.exception()

    def let_go(self, values: list[Tensor]) -> None:
        """Take values that no parameter refers to any more; the caller drops them, too."""
        if self._side is not None:
            self._leaving += values

    def close(self) -> None:
        """Wait for what is under way; what goes wrong there does not matter any more. No memory is held afterwards."""
        self._pool.shutdown()
        if self._side is not None:
            torch.cuda.synchronize(self._device)
        self._ahead, self.pending = None, []
        self._leaving.clear()
