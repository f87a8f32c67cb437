"""Texts with labels: records with a column for each, or pairs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch

from ...support.errors import FFMergeError
from .classes import counted, labels_of_model
from .documents import existing
from .records import holds_records, read_rows, text_column

_LABELS = ("label", "labels")  # what columns of labels are called


class LabelledTexts:
    """Texts and the class of each.

    Args:
        labels: names, or whole numbers from 0.
        classes: names of the numbers, where the data has both.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[Any], classes: Sequence[str] | None = None):
        if not len(texts):
            raise FFMergeError("labelled data: no examples; give at least one text with a label")
        self.texts = list(texts)
        self.by_name = all(isinstance(label, str) for label in labels)
        if self.by_name:
            self.classes = sorted(set(labels))
            numbers = [self.classes.index(label) for label in labels]
        else:
            numbers, self.classes = list(labels), None if classes is None else list(classes)
            for i, label in enumerate(numbers):
                if not isinstance(label, int) or label < 0:
                    raise FFMergeError(
                        f"labelled data: example {i} has the label {label!r}, wanted names, or whole numbers from 0; "
                        "leave out what has none"
                    )
        self.labels = torch.tensor(numbers)

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> LabelledTexts:
        """The examples at `indices`, in that order."""
        return self._with([self.texts[i] for i in indices], self.labels[list(indices)], self.classes)

    def for_model(self, model: Any, split: str) -> LabelledTexts:
        """The same texts with the model's labels; see `labels_of_model`."""
        found = labels_of_model(model, self.labels, self.classes, self.by_name, "labelled data", split)
        return self._with(self.texts, *found)

    def counts(self) -> str:
        """How many texts each class got, in words."""
        return counted(self.labels, self.classes, "texts")

    def _with(self, texts: list[str], labels: torch.Tensor, classes: list[str] | None) -> LabelledTexts:
        made = LabelledTexts(texts, labels.tolist(), classes)
        made.by_name = self.by_name
        return made


def load_labelled(source: Any, split: str, text: str | None, label: str | None) -> LabelledTexts:
    """Labelled texts from a file or folder of records, or from (text, label) pairs.

    Args:
        text, label: the columns; default the only one with text, and "label" or "labels".

    Raises:
        FFMergeError: no such file, no records, no such column, a row without a label.
    """
    if isinstance(source, LabelledTexts):
        return source
    if not isinstance(source, (str, os.PathLike)):
        pairs = [tuple(pair) for pair in source]
        if any(len(pair) != 2 or not isinstance(pair[0], str) for pair in pairs):
            raise FFMergeError("labelled data: wanted a file of records, or a list of (text, label) pairs")
        return LabelledTexts(*([pair[i] for pair in pairs] for i in range(2)))
    path = existing(source, "labelled data")
    if not holds_records(path):
        raise FFMergeError(
            f"labelled data: {path} holds no records; give JSON lines, JSON, CSV or Parquet with a column of texts and "
            "one of labels"
        )
    return read_rows(path, split, lambda rows: _of_rows(rows, text, label, str(path)))


def _of_rows(rows: Any, text: str | None, label: str | None, data: str) -> LabelledTexts:
    columns = list(next(iter(itertools.islice(rows, 1)), {}))
    label = label or next((name for name in _LABELS if name in columns), None)
    if label not in columns:
        raise FFMergeError(
            f"labelled data: {data} has no column {label or 'label'!r}, only {', '.join(columns) or 'none'}; name "
            "that of the labels by --label-column (label_column=)"
        )
    text = text_column(rows, text, data, label)
    found = [(row[text], row[label]) for row in rows if isinstance(row[text], str)]
    names = getattr((rows.features or {}).get(label), "names", None)
    return LabelledTexts([t for t, _ in found], [value for _, value in found], names)
