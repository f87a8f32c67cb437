"""Tensors away from the device: in files, and those of a GPU in host memory while there is some."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from ...support.errors import FFMergeError
from ...support.machine import free_memory
from ...support.sizes import format_bytes

_SHARE = 0.5  # of free host memory that one more tensor may take


class Spool:
    """Files in the folder for temporary files (TMPDIR), without a name, so that nothing is left whatever happens.

    Args:
        device: where the tensors come from; those of a GPU are kept in host memory first.
    """

    def __init__(self, device: torch.device):
        self._device, self._to_host = device, device.type != "cpu"

    def store(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the CPU."""
        if self._to_host and tensor.nbytes < _SHARE * (free_memory(torch.device("cpu")) or 0):
            return tensor.to("cpu", copy=True)
        return self._in_file(tensor)

    def load(self, stored: Tensor) -> Tensor:
        """What was stored, on the device."""
        return stored.to(self._device)

    def _in_file(self, tensor: Tensor) -> Tensor:
        """A copy in a file of its own, mapped into memory: the system reads and drops its pages."""
        if not tensor.numel():
            return tensor.to("cpu", copy=True)
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
