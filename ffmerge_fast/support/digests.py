"""Short hashes of what decides a result: calibration data, examples, a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .distributed import whole

_WORDS = 256  # int64 words in a row of the table whose rows and columns are summed


class Digest:
    """A running hash of batches and other nested values; `str()` gives it as 16 hexadecimal digits.

    Attributes:
        count: values that were added.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)
        self.count = 0

    def __str__(self) -> str:
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        """Tensors and arrays by dtype, shape and bytes, mappings in the order of their keys; of an object that is none
        of these, None, a number, text or bytes, only its kind."""
        self._feed(value)
        self.count += 1

    def _feed(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._mark(f"{value.dtype} {tuple(value.shape)}")
            self._hash.update(_bytes(value).cpu().numpy())
        elif isinstance(value, np.ndarray):
            self._mark(f"{value.dtype} {value.shape}")
            self._hash.update(value.tobytes())
        elif isinstance(value, (bytes, memoryview)):
            self._mark(f"{len(value)} bytes")
            self._hash.update(value)
        elif isinstance(value, Mapping):
            self._mark(f"{len(value)} entries")
            for name in sorted(value, key=str):
                self._mark(str(name))
                self._feed(value[name])
        elif isinstance(value, Sequence) and not isinstance(value, str):
            self._mark(f"{len(value)} values")
            for one in value:
                self._feed(one)
        elif value is None or isinstance(value, (str, int, float)):
            self._mark(repr(value))
        else:
            self._mark(type(value).__name__)

    def _mark(self, text: str) -> None:
        self._hash.update(f"{text}\n".encode("utf-8", "surrogatepass"))


def content_hash(*values: Any) -> str:
    """The `Digest` of some values."""
    digest = Digest()
    for value in values:
        digest.add(value)
    return str(digest)


def weights_hash(model: nn.Module, read: Callable[[Tensor], Tensor] = Tensor.detach) -> str:
    """A hash of every bit of a model's parameters and saved buffers, each once, by name; a few integer sums where they
    are. Of weights on "meta" and of quantised ones name, dtype and shape. Every rank must call this for a sharded one.

    Args:
        read: gives the values of a parameter that is elsewhere.
    """
    digest = Digest()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *_saved_buffers(model)]:
            digest.add(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
            tensor = whole(read(tensor))
            if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
                digest.add(_sums(tensor))
    return str(digest)


def _saved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    saved = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def _sums(tensor: Tensor) -> Tensor:
    """Sums over the rows and over the columns of the bits in a table of int64 words; integers wrap, so they are exact
    on every device. One changed value changes two of them, and a permutation their order."""
    raw = _bytes(tensor)
    padded = raw.new_zeros(-(-len(raw) // (8 * _WORDS)) * 8 * _WORDS)
    padded[: len(raw)] = raw
    words = padded.view(torch.int64).view(-1, _WORDS)
    return torch.cat([words.sum(0), words.sum(1)])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
