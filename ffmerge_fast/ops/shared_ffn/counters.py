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
        return torch.zeros(4, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            spare = _spare.get(device)
            return spare.pop() if spare else torch.zeros(4, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream()
        if device not in _spare:
            _spare[device] = list(torch.zeros(_CAPTURED, 4, dtype=torch.int32, device=device))
            stream.synchronize()  # once: graphs may be replayed on other streams
        key = device, stream.cuda_stream
        if key not in _of_stream:
            _of_stream[key] = torch.zeros(4, dtype=torch.int32, device=device)
        return _of_stream[key]
