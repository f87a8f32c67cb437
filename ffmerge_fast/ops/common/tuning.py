"""Launch parameters of Triton kernels: those kept for this GPU in configs/<GPU>.json, else the op's closed form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

CONFIGS = Path(__file__).parent / "configs"
Config = dict[str, int]
_SHARED = 64 * 1024  # bytes of one block where torch does not tell: what all current GPUs have


def config(kernel: str, device: torch.device, closed_form: Callable[[int], Config]) -> Config:
    """Parameters of `kernel`: block sizes, num_warps, num_stages and what else it takes at compile time.

    Args:
        kernel: its key in the files.
        device: where it runs; the file is found by the GPU's name.
        closed_form: shared memory of one block in bytes -> parameters, for GPUs without a file.
    """
    if device.type != "cuda":  # the interpreter
        return closed_form(_SHARED)
    name, shared = _gpu(device)
    return _shipped(name).get(kernel) or closed_form(shared)


@cache
def _gpu(device: torch.device) -> tuple[str, int]:
    """Its name, and shared memory of one block in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, getattr(properties, "shared_memory_per_block_optin", _SHARED)


def file_name(gpu: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "NVIDIA_H100_80GB_HBM3.json"."""
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_") + ".json"


@cache
def _shipped(gpu: str) -> dict[str, Config]:
    path = CONFIGS / file_name(gpu)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
