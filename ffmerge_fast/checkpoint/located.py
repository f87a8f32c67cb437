"""Which tensor of a folder's files is which weight of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..models.elsewhere import InFile
from ..models.sublayers import base_model_path, join
from ..support.tensor_files import Reader, WeightEntry

OF_MODEL = Reader("model", "its weights", "do it again", "folder")


def located(model: nn.Module, entries: Mapping[str, WeightEntry]) -> dict[Tensor, InFile]:
    """{parameter: its place} of those that an entry of their shape has one of the names of, with or without the base
    model's prefix."""
    prefix = base_model_path(model) or getattr(model, "base_model_prefix", "")
    found: dict[Tensor, InFile] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        for form in (name, name.removeprefix(f"{prefix}."), join(prefix, name)):
            if form in entries and entries[form].shape == tuple(weight.shape):
                found.setdefault(weight, InFile(entries[form], weight.dtype))
    return found


def by_loaded_names(model: nn.Module, entries: Mapping[str, WeightEntry]) -> dict[str, WeightEntry]:
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
