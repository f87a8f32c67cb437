"""Texts in records: JSON lines, JSON, CSV, Parquet, Arrow, and folders of them, through the datasets library."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...support.env import require
from ...support.errors import FFMergeError

_BUILDERS = {  # of the datasets library, and what it is told
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
_SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk writes into a folder
_HEAD = 20  # rows by which it is told which columns hold text
_STAND_IN = {"validation": "test", "test": "validation"}


def holds_records(path: Path) -> bool:
    """Whether a file holds records, by the end of its name (".gz" aside), or a folder is a data set of them.

    Raises:
        FFMergeError: a folder has records and other texts, so that it cannot be told what is meant.
    """
    if path.is_file():
        return _suffix(path) in _BUILDERS
    if any((path / name).is_file() for name in _SAVED):
        return True
    files = visible_files(path)
    records = [file for file in files if _suffix(file) in _BUILDERS]
    texts = [file for file in files if _suffix(file) == ".txt"]
    if records and texts:
        raise FFMergeError(
            f"text data: {path} holds records ({records[0].name}) and texts ({texts[0].name}); give the files you want"
        )
    return bool(records)


def load_records(path: Path, split: str, column: str | None) -> list[str]:
    """The texts of a file or folder of records.

    Args:
        split: which part of a folder that has several; validation and test stand in for one another.
        column: that holds the texts; default the only column with strings.

    Raises:
        FFMergeError: unreadable, no such split or column, or several columns with strings and `column` not given.
    """
    return read_rows(path, split, lambda rows: texts_of(rows, column, str(path)))


def read_rows(path: Path, split: str, take: Callable[[Any], Any]) -> Any:
    """What `take` makes of the rows (a data set) of a file or folder of records; see `load_records`."""
    datasets = require("datasets", extra="driver")
    try:
        if path.is_file():
            builder, options = _BUILDERS[_suffix(path)]
            rows = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
        elif any((path / name).is_file() for name in _SAVED):
            rows = _of_split(datasets.load_from_disk(str(path)), split, path)
        else:
            rows = _of_split(datasets.load_dataset(str(path), streaming=True), split, path)
        return take(rows)
    except FFMergeError:
        raise
    except Exception as error:  # readers of seven formats raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FFMergeError(f"text data: {path} cannot be read as records: {reason}") from error


def texts_of(rows: Any, column: str | None, data: str) -> list[str]:
    """The strings of one column of a data set; rows without one are passed over. See `load_records`."""
    column = text_column(rows, column, data)
    return [row[column] for row in rows.select_columns([column]) if isinstance(row[column], str)]


def text_column(rows: Any, column: str | None, data: str, label: str | None = None) -> str:
    """The column that holds the texts: `column`, or the only one with strings beside `label`."""
    head = list(itertools.islice(rows, _HEAD))
    columns = list(head[0]) if head else []
    strings = [name for name in columns if name != label and any(isinstance(row.get(name), str) for row in head)]
    if column is None and len(strings) > 1:
        raise FFMergeError(
            f"text data: {data} has several columns with text ({', '.join(strings)}); name one by --text-column "
            "(text_column=)"
        )
    column = column or (strings[0] if strings else "text")
    if column not in strings:
        found = f"columns with text: {', '.join(strings)}" if strings else f"only {', '.join(columns) or 'no columns'}"
        raise FFMergeError(f"text data: {data} has no text in a column {column!r}; it has {found}")
    return column


def visible_files(folder: Path) -> Sequence[Path]:
    """Files below a folder, sorted, without hidden ones."""
    found = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [f for f in found if not any(part.startswith((".", "__MACOSX")) for part in f.relative_to(folder).parts)]


def choose_split(there: Iterable[str], split: str, data: str | os.PathLike) -> str:
    """`split`, or what stands in for it: test for validation and the reverse, or the only one there is."""
    there = list(there)
    chosen = next((name for name in (split, _STAND_IN.get(split)) if name in there), None)
    if chosen is None and len(there) != 1:
        raise FFMergeError(
            f"data: {data} has no {split} split, only {', '.join(there)}; give the file or folder itself"
        )
    return chosen or there[0]


def _of_split(found: Any, split: str, path: Path) -> Any:
    return found[choose_split(found, split, path)] if isinstance(found, dict) else found


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix
