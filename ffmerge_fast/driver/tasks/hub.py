"""Data sets of the Hugging Face hub, by name; only where the network is allowed."""

from __future__ import annotations

from typing import Any

from ...support.env import online, require
from ...support.errors import FFMergeError
from .images import ImageData
from .records import texts_of

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


def load_hub(name: str, split: str, kind: str, column: str | None = None) -> Any:
    """Read "name" or "name:configuration" of the hub in the form the task `kind` wants.

    Returns:
        Texts of the column `column` (kinds "lm", "masked"; see `load_records`), an `ImageData` ("images"), or pairs of
        sentences in the order of the languages in the data set's `translation` column ("translation").

    Raises:
        FFMergeError: no network allowed, no such data set or split, or no column of that kind.
    """
    if not online():
        raise FFMergeError(
            f"data: {name} does not exist here; give a path, or allow Hugging Face data set names with FFMERGE_ONLINE=1"
        )
    rows = _load(name, split)
    if kind == "images":
        label = _column(rows, _LABEL_COLUMNS, name)
        names = getattr(rows.features[label], "names", None)
        return ImageData(list(rows[_column(rows, _IMAGE_COLUMNS, name)]), list(rows[label]), names)
    if kind != "translation":
        return texts_of(rows, column, name)
    pairs = list(rows[_column(rows, ("translation",), name)])
    source, target = list(pairs[0])[:2]
    return [(pair[source], pair[target]) for pair in pairs]


def _load(name: str, split: str) -> Any:
    datasets = require("datasets", extra="driver")
    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FFMergeError(f"data: {name} (split {split}) cannot be loaded from the hub: {reason}") from error
    if not len(rows):
        raise FFMergeError(f"data: split {split} of {name} is empty")
    return rows


def _column(rows: Any, names: tuple[str, ...], data: str) -> str:
    for name in names:
        if name in rows.column_names:
            return name
    raise FFMergeError(f"data: {data} has the columns {', '.join(rows.column_names)}; wanted {' or '.join(names)}")
