"""Tensors on disk, and the memory that a state may take."""

from __future__ import annotations

import os
import re
import tempfile

import torch
from torch import Tensor

from ..._errors import FFMergeError

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class Spool:
    """Files in the folder for temporary files (TMPDIR), without a name, so that nothing is left whatever happens."""

    def store(self, tensor: Tensor) -> Tensor:
        """A copy of a CPU tensor in a file of its own, mapped into memory: the system reads and drops its pages."""
        if not tensor.numel():
            return tensor.clone()
        descriptor, path = tempfile.mkstemp(prefix="ffmerge-")
        try:
            self._reserve(descriptor, tensor.nbytes)
            stored = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(descriptor)
            os.unlink(path)
        return stored.view(tensor.shape).copy_(tensor)

    @staticmethod
    def _reserve(descriptor: int, nbytes: int) -> None:
        """Writing to a mapped file on a full disk kills the process: ask for the space first."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, nbytes)
            else:
                os.truncate(descriptor, nbytes)
        except OSError as error:
            raise FFMergeError(
                f"max_memory: cannot spool {format_bytes(nbytes)} to {tempfile.gettempdir()} ({error.strerror}); "
                "set TMPDIR to a folder on a larger disk"
            ) from error


def parse_bytes(value: int | str, name: str = "max_memory") -> int:
    """8589934592, "8GiB" or "500 MB" as a number of bytes.

    Raises:
        FFMergeError: anything else, or nothing positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", str(value).strip().lower())
    if isinstance(value, bool) or not match or match[2] not in _UNITS or not float(match[1]):
        raise FFMergeError(f"{name}: got {value!r}, want a number of bytes or text such as '8GiB' or '500MB'")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(nbytes: int) -> str:
    """34603008000 -> "32.2 GiB"."""
    unit = max((u for u in ("", "kib", "mib", "gib", "tib") if _UNITS[u] <= max(nbytes, 1)), key=_UNITS.get)
    return f"{nbytes / _UNITS[unit]:.1f} {unit[:1].upper()}iB" if unit else f"{nbytes} bytes"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = [_meminfo("MemAvailable"), _left_in_cgroup()]
    return min((f for f in free if f is not None), default=None)


def _meminfo(name: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:")), None)
    except OSError:
        return None


def _left_in_cgroup() -> int | None:
    """What a container's memory limit leaves (cgroup v2); page cache is counted as free, it is given back."""
    folder = "/sys/fs/cgroup"
    try:
        with open(f"{folder}/memory.max", encoding="ascii") as file:
            limit = int(file.read())
        with open(f"{folder}/memory.stat", encoding="ascii") as file:
            used = dict(line.split() for line in file)
        return limit - int(used["anon"])
    except (OSError, ValueError, KeyError):
        return None
