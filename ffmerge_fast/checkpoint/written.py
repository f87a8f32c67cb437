"""Whether the files of a folder are the model that was written, before it gets its name."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..support.errors import FFMergeError
from ..support.tensor_files import DTYPES, Reader, WeightEntry, entries_of, is_plain, memory
from .manifest import MANIFEST, digest, read_manifest

Named = list[tuple[str, Tensor]]  # one tensor under its names
_READER = Reader("folder", "what was saved", "save the model again", "folder")


def check_written(folder: Path, model: nn.Module) -> None:
    """Raise FFMergeError unless a folder that `save_pretrained` filled holds each of the model's weights once, the
    shared ones with the hashes of its manifest, and a config with its groups.

    Weights are counted by dtype and shape, as a class may save them under other names. Not looked at are weights that
    are not in memory, quantised or sharded.
    """
    entries = entries_of(folder, _READER)
    manifest = read_manifest(folder / MANIFEST)
    weights = _distinct(model)
    if all(is_plain(same[0][1]) and not same[0][1].is_meta for same in weights):
        _check_headers(model, weights, entries)
    _check_ties(folder, manifest)
    prefix = getattr(model, "base_model_prefix", "")
    for name, wanted in manifest["shared"].items():
        entry = entries.get(name) or entries.get(name.removeprefix(f"{prefix}."))
        if entry is not None and digest(entry.read()) != wanted:
            raise _not_written(model, f"{name} has other values")


def _check_headers(model: nn.Module, weights: list[Named], entries: dict[str, WeightEntry]) -> None:
    """Every weight once; what the class does not save may be missing."""
    unsaved = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    found = Counter((entry.dtype, entry.shape) for entry in entries.values())
    known = Counter(_kind(same) for same in weights)
    needed = Counter(_kind(same) for same in weights if not all(any(u.search(n) for u in unsaved) for n, _ in same))
    for wrong, what in ((needed - found, "lack"), (found - known, "have too many")):
        if wrong:
            dtype, shape = next(iter(wrong))
            raise _not_written(
                model, f"the files {what} {wrong.total()} tensors, the first of shape {list(shape)} in {dtype}"
            )


def _check_ties(folder: Path, manifest: dict[str, Any]) -> None:
    """config.json groups the layers that the manifest does, where it groups any."""
    path = folder / "config.json"
    said = (json.loads(path.read_text("utf-8")).get("ffmerge") if path.exists() else None) or {}
    wanted = sorted(group["layers"] for group in manifest["groups"])
    if said and sorted(group["layers"] for group in said["groups"]) != wanted:
        raise FFMergeError(f"folder: its config.json groups other layers than the model's, {wanted}; nothing was kept")


def _distinct(model: nn.Module) -> list[Named]:
    """Parameters and saved buffers of the dtypes that weights have: each with all its names."""
    found: dict[tuple, Named] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.dtype in DTYPES.values():
            found.setdefault(memory(tensor), []).append((name, tensor))
    return list(found.values())


def _kind(same: Named) -> tuple[torch.dtype, tuple[int, ...]]:
    return same[0][1].dtype, tuple(same[0][1].shape)


def _not_written(model: nn.Module, what: str) -> FFMergeError:
    return FFMergeError(
        f"folder: what {type(model).__name__} wrote is not the model, {what}; nothing was kept; a model with adapters "
        "has to be merged with them before"
    )
