"""Tensors on disk."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from ...support.errors import FFMergeError
from ...support.sizes import format_bytes


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
