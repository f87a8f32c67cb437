"""What a folder of weights holds, found without loading the model: one tensor at a time is in memory."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..models.sublayers import FFNs, base_model_path, find_ffns, join
from ..models.summary import ModelSummary
from ..support.tensor_files import Reader, WeightEntry, entries_in
from .contents import weight_files
from .folder import from_pretrained

_READER = Reader("model", "its weights", "do it again", "folder")


def summarize(folder: str | os.PathLike, **options: Any) -> tuple[ModelSummary, nn.Module]:
    """A model's summary, and the model: on "meta", or loaded where its files do not have its layers' weights as such.

    Args:
        folder, options: as for `from_pretrained`.

    Raises:
        FFMergeError: as `from_pretrained` and `find_ffns`; a file is changed meanwhile.
    """
    if importlib.util.find_spec("accelerate"):  # without it transformers loads to the CPU only
        model = from_pretrained(folder, device_map="meta", **options)
        ffns = find_ffns(model)
        entries = _entries_of_layers(model, ffns, entries_in(weight_files(folder), _READER))
        if entries is not None:
            return ModelSummary.of(model, ffns, lambda weight: entries[weight].read().to(weight.dtype)), model
    model = from_pretrained(folder, **options)
    return ModelSummary.of(model), model


def _entries_of_layers(
    model: nn.Module, ffns: FFNs, entries: Mapping[str, WeightEntry]
) -> dict[Tensor, WeightEntry] | None:
    """Where the weights of the layers around the FFNs lie; None unless all have their shape, and one of their names
    with or without the base model's prefix."""
    entries = _by_loaded_names(model, entries)
    prefix = base_model_path(model) or getattr(model, "base_model_prefix", "")
    found = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        for form in (name, name.removeprefix(f"{prefix}."), join(prefix, name)):
            if form in entries and entries[form].shape == tuple(weight.shape):
                found.setdefault(weight, entries[form])
    wanted = (weight for ffn in ffns for weight in model.get_submodule(ffn.path).parameters())
    return found if all(weight in found for weight in wanted) else None


def _by_loaded_names(model: nn.Module, entries: Mapping[str, WeightEntry]) -> dict[str, WeightEntry]:
    """The entries by the names that transformers 5 loads them under; none where it changes values, too."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4 takes the names as they are
        return dict(entries)
    transforms = get_model_conversion_mapping(model)
    if not all(isinstance(transform, WeightRenaming) for transform in transforms):
        return {}
    renamed = {}
    for name, entry in entries.items():
        for transform in transforms:
            name, _ = transform.rename_source_key(name)
        renamed[name] = entry
    return renamed
