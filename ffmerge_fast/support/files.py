"""Folders and files that are complete or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import FFMergeError


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
    except (OSError, SafetensorError) as error:
        raise FFMergeError(f"{path} could not be written ({one_line(error)}); nothing was changed there") from error
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


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file that is complete or, as it was before, absent; folders above it are made.

    Raises:
        FFMergeError: it cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise FFMergeError(f"{path} could not be written ({error.strerror})") from error


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
