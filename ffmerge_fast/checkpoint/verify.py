"""Prove that a folder holds what was saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..support.errors import FFMergeError
from .beside import MANIFEST
from .folder import from_pretrained
from .manifest import compare_logits, groups_of, hashes_of_shared, read_manifest
from .on_disk import open_on_disk


def verify(folder: str | os.PathLike, model: nn.Module | None = None) -> dict[str, Any]:
    """Check that a folder holds the merged model that was saved: hashes, ties and reference logits.

    A transformers model is never whole in memory: the logits are computed block by block.

    Args:
        folder: written by `save_pretrained`.
        model: for a folder of a plain `nn.Module`: a freshly built, unmerged one (it is filled).

    Returns:
        {"groups", "parameters", "bytes", "logit_difference" (None for a plain module)}.

    Raises:
        FFMergeError: one line that says what is wrong with the folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FFMergeError(f"{folder} is not a folder")
    if not (path / MANIFEST).exists():
        raise FFMergeError(f"{path} has no {MANIFEST}: it was not written by ffmerge_fast.save_pretrained")
    model = (open_on_disk(path) if model is None else None) or from_pretrained(path, model)
    manifest = read_manifest(path / MANIFEST)
    found = groups_of(model)
    if found != manifest["groups"]:
        raise FFMergeError(f"{path}: layers {found} share FFNs, but {manifest['groups']} were saved as shared")
    hashes = hashes_of_shared(model)
    if differ := sorted(n for n in manifest["shared"] if hashes.get(n) != manifest["shared"][n]):
        raise FFMergeError(f"{path}: {differ[0]} is not what was saved ({len(differ)} shared tensors differ)")
    return {
        "groups": found,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.stat().st_size for p in path.glob("*.safetensors")),
        "logit_difference": compare_logits(path, model, manifest) if "logits" in manifest else None,
    }
