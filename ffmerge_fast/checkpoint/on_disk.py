"""A folder's model without its weights in memory: on "meta", each parameter with its place in the files."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.elsewhere import Elsewhere
from ..models.sublayers import find_ffns
from ..models.summary import ModelSummary
from ..support.tensor_files import WeightEntry, entries_in
from .contents import weight_files
from .folder import from_pretrained
from .located import OF_MODEL, by_loaded_names, located


def open_on_disk(folder: str | os.PathLike, **options: Any) -> nn.Module | None:
    """The model in a folder, with its parameters on "meta" and its buffers in memory, read one by one.

    Whoever takes `models.elsewhere.reader_of` works on it: summaries, `merge_`, `stream_`, `save_pretrained`.

    Args:
        folder, options: as for `from_pretrained`.

    Returns:
        None where the files do not hold the weights as such: pickles, families whose values change while they load.

    Raises:
        FFMergeError: as `from_pretrained`.
    """
    if not importlib.util.find_spec("accelerate"):  # without it transformers loads to the CPU only
        return None
    model = from_pretrained(folder, device_map="meta", **options).eval()
    model.__dict__.pop("hf_device_map", None)  # of the loading, not of the model
    entries = by_loaded_names(model, entries_in(weight_files(folder), OF_MODEL))
    found = _computed(model) | located(model, entries)
    if any(weight not in found for weight in model.parameters()) or not _fill_buffers_(model, entries):
        return None
    Elsewhere(str(folder), found).attach_(model)
    return model


def summarize(folder: str | os.PathLike, **options: Any) -> tuple[ModelSummary, nn.Module]:
    """A model's summary, and the model: on "meta", or loaded where its files do not have its weights as such.

    Args:
        folder, options: as for `from_pretrained`.

    Raises:
        FFMergeError: as `from_pretrained` and `find_ffns`; a file is changed meanwhile.
    """
    model = open_on_disk(folder, **options)
    if model is None:
        model = from_pretrained(folder, **options)
    return ModelSummary.of(model, find_ffns(model)), model


def _computed(model: nn.Module) -> dict[Tensor, Callable[[], Tensor]]:
    """What gives the weights that a class computes and does not save: tables of sines."""
    unsaved, found = [re.compile(pattern) for pattern in model._keys_to_ignore_on_save or ()], {}
    for name, weight in model.named_parameters():
        if any(pattern.search(name) for pattern in unsaved):
            path, _, attribute = name.rpartition(".")
            found[weight] = partial(_initial, model, path, attribute)
    return found


@torch.no_grad()
def _initial(model: nn.Module, path: str, attribute: str) -> Tensor:
    """A weight as the class makes it."""
    module = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu")
    model._init_weights(module)
    return getattr(module, attribute).detach()


def _fill_buffers_(model: nn.Module, entries: Mapping[str, WeightEntry]) -> bool:
    """Give buffers on "meta" their values: of the files, or as the class computes them. Whether all have theirs now."""
    missing = {name for name, buffer in model.named_buffers() if buffer.is_meta}
    if not missing:
        return True
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        twin = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    computed, saved = dict(twin.named_buffers()), model.state_dict().keys()
    for name in missing:
        path, _, attribute = name.rpartition(".")
        value = entries[name].read() if name in entries else None if name in saved else computed.get(name)
        if value is None or value.is_meta:
            return False
        model.get_submodule(path)._buffers[attribute] = value
    return True
