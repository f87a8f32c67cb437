"""Folders and files that are complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import FFMergeError

if TYPE_CHECKING:  # torch comes with the first tensor
    from torch import Tensor


class WriteError(FFMergeError):
    """A file could not be written; its cause says why."""


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; it appears under its name when the block ends, or not at all.

    Raises:
        FFMergeError: `path` is a file, or a folder with content and not `overwrite`; or it cannot be written.
    """
    check_new_folder(path, overwrite)
    path = Path(path).resolve()  # a linked folder is replaced where it lies
    new_parents = [p for p in path.parents if not p.exists()]
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        beside.mkdir(parents=True)
        yield beside
        _open_permissions(beside)
        _rename_over(beside, path)
    except (OSError, SafetensorError, WriteError) as error:
        cause = error.__cause__ if isinstance(error, WriteError) else error
        raise FFMergeError(f"{path} could not be written ({one_line(cause)}); nothing was changed there") from cause
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty after a success
            for parent in new_parents:
                parent.rmdir()


def check_new_folder(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise FFMergeError if `new_folder(path)` would refuse: to be called before long work."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FFMergeError(f"{path} is a file; give a folder to write")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FFMergeError(f"{path} exists and is not empty; give another folder, or --overwrite (overwrite=True)")
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK):
        raise FFMergeError(f"{path} cannot be written: no permission in {existing}")


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write under another name beside `path`; it is there when the block ends, or as it was before.

    Folders above it are made.

    Raises:
        WriteError: it cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise WriteError(f"{path} could not be written ({reason})") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or its folder is none
            beside.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a `new_file` of text."""
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 1) -> None:
    """Write a `new_file` of JSON."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a `new_file` of tensors, by safetensors; equal content is equal byte by byte."""
    from safetensors.torch import save_file

    with new_file(path) as beside:
        save_file(tensors, beside, metadata)
        if metadata and len(metadata) > 1:
            _sort_metadata(beside)


def _sort_metadata(path: Path) -> None:
    """Give a safetensors file's metadata the order of its keys; safetensors writes them in no order."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # else as it is: these are the same characters in another order
            file.seek(8)
            file.write(text.ljust(size))


def _open_permissions(folder: Path) -> None:
    """Give files the usual permissions of new ones; safetensors makes them readable by their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def _rename_over(new: Path, path: Path) -> None:
    old = None
    if path.exists():
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old:
            old.rename(path)
        raise
    if old:
        shutil.rmtree(old, ignore_errors=True)


def one_line(error: BaseException) -> str:
    """Its kind and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
