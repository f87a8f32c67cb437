"""Zeros on the device for kernels whose programs count each other, without filling them before every launch."""

from __future__ import annotations

import torch
from torch import Tensor

_CAPTURED = 1024  # launches in CUDA graphs, per device, that get their counters without a node that zeroes them
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_spare: dict[torch.device, list[Tensor]] = {}


def counters(device: torch.device) -> Tensor:
    """Four int32 zeros, aligned to 16 bytes, that the launch they are for leaves as zeros.

    Launches of one stream follow each other and share theirs. One that is captured gets its own for good, as nobody
    knows when its graph is replayed; after the first 1024, or with no launch before the capture, a fill is captured.
    """
    if device.type != "cuda":
        return _zeros(device)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            spare = _spare.get(device)
            return spare.pop() if spare else _zeros(device)
        stream = torch.cuda.current_stream()
        found = _of_stream.get((device, stream.cuda_stream))
        return _first(device, stream) if found is None else found


def _first(device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    """The counters of a stream's first launch, kept unless their memory belongs to somebody's graph."""
    if device not in _spare:
        spare = _zeros(device, _CAPTURED)
        if _in_private_pool(spare):
            return spare[0]
        _spare[device] = list(spare)
        stream.synchronize()  # once: graphs may be replayed on other streams
    kept = _spare[device].pop() if _spare[device] else _zeros(device)
    if not _in_private_pool(kept):
        _of_stream[device, stream.cuda_stream] = kept
    return kept


def _zeros(device: torch.device, *count: int) -> Tensor:
    return torch.zeros(*count, 4, dtype=torch.int32, device=device)


def _in_private_pool(tensor: Tensor) -> bool:
    """Whether torch took its memory from a pool of graphs: torch.compile warms up in the one it records into."""
    address = tensor.data_ptr()
    segments = torch.cuda.memory_snapshot()
    holding = (s for s in segments if s["address"] <= address < s["address"] + s["total_size"])
    return any(tuple(segment["segment_pool_id"]) != (0, 0) for segment in holding)
