"""Which files of a folder are the model, and what is refused before any of them is believed."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..support.errors import FFMergeError
from ..support.files import one_line

_POINTER = b"version https://git-lfs."
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of older versions' checkpoints: masks, positions and frequencies that classes compute today.
OLD_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|num_batches_tracked|rotary_emb\.inv_freq"
    r"|attn\.(masked_bias|bias|causal_mask)|attention\.(masked_)?bias)$"
)


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The safetensors files that transformers takes from a folder, or from its cache of a hub id."""
    if whole := _file(folder, WEIGHTS):
        return [whole]
    index = _file(folder, INDEX)
    return [path for name in _named_in(index) if (path := _file(folder, name))] if index else []


def whole_numbers(folder: str | os.PathLike) -> list[str]:
    """The names of the tensors that are stored in an integer dtype."""
    found = []
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            found += [name for name in tensors.keys() if tensors.get_slice(name).get_dtype()[0] in "IU"]  # noqa: SIM118
    if not weight_files(folder) and os.path.isdir(folder):
        for file in Path(folder).glob("pytorch_model*.bin"):
            tensors = torch.load(file, map_location="meta", weights_only=True)
            found += [name for name, t in tensors.items() if isinstance(t, torch.Tensor) and not _is_real(t)]
    return found


def _is_real(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool


def check_files(folder: Path) -> None:
    """Raise FFMergeError for named pipes and devices, on which a reader would hang."""
    for path in folder.iterdir():
        if path.exists() and not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise FFMergeError(f"{path} is a pipe, socket or device, wanted a file; remove it or copy the folder again")


def check_model(folder: Path) -> None:
    """Raise FFMergeError unless the folder holds one whole model, in files of its own that can be opened."""
    check_files(folder)
    if (adapter := folder / "adapter_config.json").exists():
        raise FFMergeError(
            f"{folder} holds an adapter ({adapter.name}), wanted a whole model: merge it (peft's merge_and_unload) and "
            "save that to another folder, or move adapter_* away to use the model without it"
        )
    weights = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    if not weights:
        raise FFMergeError(f"{folder} holds no weights (*.safetensors); give a folder written by save_pretrained")
    for index in folder.glob("*.index.json"):
        _named_in(index)
    for file in weights:
        if file.is_file() and file.stat().st_size < 1000 and file.read_bytes().startswith(_POINTER):
            raise FFMergeError(f"{file} is a pointer of git LFS, not the weights; get them with: git lfs pull")
        if file.suffix == ".safetensors":
            _check_readable(file)
    if (file := folder / "generation_config.json").exists():
        read_json(file)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a folder; FFMergeError if it is damaged."""
    values = parse(path)
    if not isinstance(values, dict):
        raise FFMergeError(f"{path} cannot be read (got a {type(values).__name__}, wanted an object); copy it again")
    return values


def parse(path: Path) -> Any:
    """What a JSON file of a folder says; FFMergeError if it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FFMergeError(f"{path} cannot be read ({one_line(error)}); copy it again") from error


def is_file_name(name: str) -> bool:
    """Whether a name can only be that of a file in the folder it is looked up in, on every system."""
    return name not in ("", "..") and "/" not in name and PureWindowsPath(name).name == name


def _named_in(index: Path) -> list[str]:
    """The weight files of an index of shards, all of them in its folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise FFMergeError(f"{index} has no weight_map of tensors and files; copy it again")
    for name in sorted(set(names.values())):
        if not is_file_name(name):
            raise FFMergeError(f"{index} names {name!r}, wanted a file of its folder; copy the folder from its source")
    return sorted(set(names.values()))


def _check_readable(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise FFMergeError(f"{file} is damaged or cut off ({error}); copy or save it again") from error


def _file(folder: str | os.PathLike, name: str) -> Path | None:
    if Path(folder).is_dir():
        path = Path(folder) / name
        return path if path.exists() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(str(folder), name)
    return Path(cached) if isinstance(cached, str) else None
