"""Files that carry checksums of all they hold: one changed bit is noticed when they are read.

JSON objects have a "checksum" of their canonical text; safetensors files have such an object in their metadata, which
lists dtype, shape and CRC-32 of every tensor. A file without any, of an earlier version, is read as it is.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import FFMergeError
from .files import json_text, one_line, write_json, write_tensors

if TYPE_CHECKING:  # torch comes with the first tensor
    from torch import Tensor

_CHECKSUM = "checksum"


class DamagedError(FFMergeError):
    """A file is not what was written. The message says why, in a few words, for the reader's own sentence."""


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum."""
    return {**values, _CHECKSUM: _checksum(values)}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without it.

    Raises:
        DamagedError: it does not fit, or this is no object.
    """
    if not isinstance(values, Mapping):
        raise DamagedError("it holds no JSON object")
    values = dict(values)
    found = values.pop(_CHECKSUM, None)
    if found is not None and found != _checksum(values):
        raise DamagedError("its checksum does not fit, it was edited or damaged")
    return values


def write_sealed_json(path: str | os.PathLike, values: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write a JSON object with its checksum."""
    write_json(path, sealed(values), indent)


def read_sealed_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote.

    Raises:
        DamagedError: it cannot be read, or is not what was written.
    """
    try:
        return unsealed(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(error) from error


def write_sealed_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], header: Mapping[str, Any], key: str = "ffmerge"
) -> None:
    """Write a safetensors file with a JSON header in its metadata, under `key`."""
    content = sealed({**header, "tensors": {name: _facts(tensor) for name, tensor in tensors.items()}})
    write_tensors(path, tensors, {key: json.dumps(content)})


def read_sealed_tensors(
    path: str | os.PathLike, key: str = "ffmerge"
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(tensors, header) that `write_sealed_tensors` wrote; None for a file that has no such header.

    Raises:
        DamagedError: it cannot be read, or is not what was written; a tensor is missing, or one too many.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if key not in metadata:
            return tensors, None
        header = json.loads(metadata[key])
        if "tensors" in header and _CHECKSUM not in header:
            raise DamagedError("its header has changed")
        header = unsealed(header)
    except (OSError, ValueError, TypeError, SafetensorError, RecursionError) as error:
        raise _damaged(error) from error
    if metadata.get("crc32", _crc(metadata[key].encode())) != _crc(metadata[key].encode()):  # of statistics, once
        raise DamagedError("its header has changed")
    once, wanted = header.pop("crc32", None), header.pop("tensors", None)
    found = {name: _facts(tensor) for name, tensor in tensors.items()}
    if wanted is None and once is not None:
        wanted, found = once, {name: facts[-1] for name, facts in found.items()}
    if wanted is not None and wanted != found:
        name = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))[0]
        state = "has changed" if name in wanted and name in found else "is missing" if name in wanted else "is unknown"
        raise DamagedError(f"{name} {state}")
    return tensors, header


def _facts(tensor: Tensor) -> list[Any]:
    import torch

    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), zlib.crc32(raw)]


def _checksum(values: Mapping[str, Any]) -> str:
    plain = json.loads(json_text(dict(values)))  # its keys are text, which they are sorted by
    return _crc(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def _crc(content: bytes) -> str:
    return str(zlib.crc32(content))


def _damaged(error: Exception) -> DamagedError:
    return error if isinstance(error, DamagedError) else DamagedError(one_line(error))
