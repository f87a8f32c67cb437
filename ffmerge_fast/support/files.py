"""Folders and files that are complete or absent.

Both are made in a hidden folder beside, `.<name>.<random>.tmp`, which is locked while its process lives: what a killed
process left there is removed by the next one that writes the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import FFMergeError
from .sizes import format_bytes

try:
    import fcntl
except ImportError:  # Windows: leftovers stay
    fcntl = None

if TYPE_CHECKING:  # torch comes with the first tensor
    from torch import Tensor


class WriteError(FFMergeError):
    """A file could not be written; its cause says why."""


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike, overwrite: bool = False, known: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """A folder to fill; it appears under its name when the block ends, or not at all.

    Args:
        path: where it appears. A folder that has content by then is replaced, in one step where the system can, if that
            was asked for.
        overwrite, known: as for `check_new_folder`.

    Raises:
        FFMergeError: as `check_new_folder`, before and after the block; or it cannot be written.
    """
    check_new_folder(path, overwrite, known)
    path = Path(path).resolve()  # a linked folder is replaced where it lies
    new_parents = [p for p in path.parents if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with hidden_folder(path) as beside:
            yield beside
            _open_permissions(beside)
            try:
                os.rename(beside, path)  # refuses a folder that has content, whoever made it meanwhile
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                check_new_folder(path, overwrite, known)
                _exchange(beside, path)
    except (OSError, SafetensorError, WriteError) as error:
        cause = error.__cause__ if isinstance(error, WriteError) else error
        raise FFMergeError(f"{path} could not be written ({one_line(cause)}); nothing was changed there") from cause
    finally:
        with contextlib.suppress(OSError):  # not empty after a success
            for parent in new_parents:
                parent.rmdir()


def check_new_folder(
    path: str | os.PathLike, overwrite: bool = False, known: Callable[[Path], bool] | None = None
) -> None:
    """Raise FFMergeError if `new_folder(path)` would refuse: to be called before long work.

    What a killed process left of `path` is removed, and an older folder that it had moved aside is put back.

    Args:
        path: it is replaced as a whole, so it may not be a mount point nor hold the working folder.
        overwrite: replace a folder that has content.
        known: whether a file, by its path inside the folder, may be replaced; without it all may.
    """
    given, path = path, _resolved(path, "folder")
    remove_leftovers(path.parent, path.name)
    if os.path.exists(path) and not os.path.isdir(path):
        raise FFMergeError(f"{given} is a file; give a folder to write")
    _check_parent(given, path.parent, path)
    if os.path.isdir(path) and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise FFMergeError(f"{given} cannot be written: no permission in {path}")
    if os.path.isdir(path) and any(path.iterdir()) and not overwrite:
        raise FFMergeError(f"{given} exists and is not empty; give another folder, or --overwrite (overwrite=True)")
    if path in (Path.cwd(), *Path.cwd().parents):
        raise FFMergeError(f"{given} is or holds the working folder, which is not replaced; give another folder")
    if _is_mount(path):
        raise FFMergeError(f"{given} is a mount point, which cannot be replaced; give a folder in it: {path / 'model'}")
    if known and (foreign := next((file for file in _files_in(path) if not known(file)), None)):
        raise FFMergeError(
            f"{given} holds {foreign}, no part of a saved model, which --overwrite does not replace; move it away or "
            "give another folder"
        )


def check_new_file(path: str | os.PathLike) -> None:
    """Raise FFMergeError if `new_file(path)` would fail: to be called before long work."""
    given, path = path, _resolved(path, "file")
    if os.path.isdir(path):
        raise FFMergeError(f"{given} is a folder; give a file to write")
    if os.path.exists(path) and not os.path.isfile(path):
        raise FFMergeError(f"{given} is a device or a pipe; give a file to write")
    _check_parent(given, path.parent)


def check_work_folder(path: str | os.PathLike) -> None:
    """Raise FFMergeError if files cannot be written into this folder, or it cannot be made."""
    _check_parent(path, _resolved(path, "folder"))


def check_space(path: str | os.PathLike, nbytes: int) -> None:
    """Raise FFMergeError if so many bytes do not fit on the disk where `path` is or will be."""
    free = shutil.disk_usage(_existing(_resolved(path, "folder"))).free
    if nbytes > free:
        raise FFMergeError(
            f"{path}: at least {format_bytes(nbytes)} will be written and {format_bytes(free)} are free on its disk; "
            "free some, or give a path on another disk"
        )


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of files and folders here, or of the one called `name`.

    A folder that was moved aside by one that could not go on is put back.
    """
    with contextlib.suppress(OSError):
        for left in list(folder.iterdir()):
            match = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.(tmp|old)", left.name, re.DOTALL)
            if match and name in (None, match[1]) and (lock := _lock(left)) is not None:
                if match[2] == "old" and not os.path.lexists(folder / match[1]):
                    left.rename(folder / match[1])
                else:
                    shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write in a folder beside `path`; it is there when the block ends, or as it was before.

    Folders above it are made.

    Raises:
        WriteError: it cannot be written.
    """
    try:
        real = _resolved(path, "file")  # a linked file is replaced where it lies
        if os.path.exists(real) and not os.path.isfile(real):
            raise OSError(errno.EEXIST, "it is a folder, a device or a pipe")
        real.parent.mkdir(parents=True, exist_ok=True)
        with hidden_folder(real) as beside:
            yield beside / real.name
            _open_permissions(beside)
            os.replace(beside / real.name, real)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise WriteError(f"{path} could not be written ({reason})") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a `new_file` of text."""
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 1) -> None:
    """Write a `new_file` of JSON."""
    write_text(path, json_text(value, indent) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and Infinity, which it has no words for, are null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_nulled(value), indent=indent, allow_nan=False, default=str)


def _nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulled(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nulled(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


@contextlib.contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, locked until it is removed or renamed."""
    remove_leftovers(path.parent, path.name)
    while True:
        beside = _hidden(path, "tmp")
        beside.mkdir()
        lock = _lock(beside, wait=True)
        if os.path.exists(beside):  # else another process took it for a leftover, before it was locked
            break
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _lock(folder: Path, wait: bool = False) -> int | None:
    """A descriptor that locks a folder until it is closed or its process ends; None if another's does, or none can."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _exchange(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`, which is removed, or left under the name of `new`."""
    if _exchanged_at_once(new, path):
        return
    lock, old = _lock(path), _hidden(path, "old")
    try:
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _exchanged_at_once(one: Path, other: Path) -> bool:
    """Whether two folders changed their names in one step: on Linux, where the file system can."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _resolved(path: str | os.PathLike, kind: str) -> Path:
    """The path without links, if there can be such a file with a hidden one beside."""
    if not str(path):
        raise FFMergeError(f"got an empty path, wanted a {kind} to write")
    try:
        real = Path(path).resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.lstat(_hidden(real, "tmp") if real.name else real)
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a NUL
        reason = getattr(error, "strerror", None) or error
        raise FFMergeError(
            f"{str(path)[:200]!r} is no possible path ({reason}); give another {kind} to write"
        ) from error
    return real


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if os.path.exists(p))


def _files_in(folder: Path) -> Iterator[Path]:
    """The files and links in a folder and its folders, relative to it."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted(names + links):
            yield Path(root, name).relative_to(folder)


def _check_parent(given: str | os.PathLike, folder: Path, inside: Path | None = None) -> None:
    """Raise FFMergeError unless `folder` can be written or made; `inside`: what may be given instead, if it exists."""
    existing = _existing(folder)
    if not existing.is_dir():
        raise FFMergeError(f"{given} cannot be written: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        hint = f"; give a folder in it: {inside / 'model'}" if inside and os.path.isdir(inside) else ""
        raise FFMergeError(f"{given} cannot be written: no permission in {existing}{hint}")


def _is_mount(path: Path) -> bool:
    """Also where a folder of the same disk is mounted, which os.path.ismount does not see."""
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
        places = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines)
        return str(path) in places
    return os.path.ismount(path)


def _open_permissions(folder: Path) -> None:
    """Give files the usual permissions of new ones; safetensors makes them readable by their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def one_line(error: BaseException) -> str:
    """Its kind and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
