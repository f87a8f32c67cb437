"""The labels of data and the classes of a model: compared by name, or by number where one side has no names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...support.errors import FFMergeError


def labels_of_model(
    model: Any, labels: Tensor, classes: Sequence[str] | None, by_name: bool, data: str, split: str
) -> tuple[Tensor, list[str] | None]:
    """(the model's labels of the same examples, the classes' names); a model without a config takes all as they are.

    Args:
        labels: int64 [n], positions in `classes`, or numbers if that is None.
        by_name: whether the labels are no more than the order of the names.
        data, split: what they are of, for errors.

    Raises:
        FFMergeError: a class that the model does not have, or names that cannot be compared with the model's.
    """
    config = getattr(model, "config", None)
    count = getattr(config, "num_labels", None)
    if count is None:
        return labels, None if classes is None else list(classes)
    known = {_plain(name): int(i) for i, name in (config.id2label or {}).items()}
    nameless = all(re.fullmatch(r"label \d+", name) for name in known)
    if nameless or classes is None:
        _check_numbers(labels, classes if by_name else None, count, data, split)
        return labels, None if classes is None else list(classes)
    unknown = [classes[label] for label in labels.unique().tolist() if _plain(classes[label]) not in known]
    if unknown:
        raise FFMergeError(
            f"{data}: the model has no class {unknown[0]!r} of the {split} data, it has "
            f"{few(config.id2label.values())}; name the classes as the model's config.json (label2id) does"
        )
    numbers = torch.tensor([known.get(_plain(name), -1) for name in classes])
    return numbers[labels], [str(config.id2label[i]) for i in range(count)]


def counted(labels: Tensor, classes: Sequence[str] | None, examples: str) -> str:
    """How many examples each class got, in words."""
    numbers = labels.bincount(minlength=len(classes or ()))
    names = classes or range(len(numbers))
    found = [f"{name} {count}" for name, count in zip(names, numbers.tolist(), strict=True) if count]
    return f"{len(labels)} {examples}, {len(found)} classes: {few(found, 20)}"


def few(names: Iterable[Any], most: int = 8) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _check_numbers(labels: Tensor, names: Sequence[str] | None, count: int, data: str, split: str) -> None:
    """The labels themselves are the model's: possible where no name says otherwise."""
    if names is not None and len(names) != count:
        raise FFMergeError(
            f"{data}: {len(names)} classes in the {split} data ({few(names)}), but the model has {count} without "
            "names; give examples of each, or names in its config.json (id2label, label2id)"
        )
    if int(labels.max()) >= count or int(labels.min()) < 0:
        wrong = int(labels.max() if labels.max() >= count else labels.min())
        raise FFMergeError(
            f"{data}: the {split} data has the label {wrong}, but the model has {count} classes (0 to {count - 1}); "
            "give the data the model was trained for"
        )


def _plain(name: Any) -> str:
    """A class's name as it is compared: "Traffic_light" is "traffic light"."""
    return re.sub(r"[\s_-]+", " ", str(name)).strip().lower()
