"""Work that is kept so that a killed run goes on: what decided it, running sums on disk, and who is using it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .digests import Digest
from .distributed import file_of_rank
from .errors import FFMergeError
from .files import remove_leftovers

_SHORT = 40  # characters of a value that an error shows
_OTHER_DATA = "other data, or the same in other batches (their order, size or length)"


class Signature(dict[str, Any]):
    """What decides a kept result, as {name: JSON value}."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__(json.loads(json.dumps(dict(values))))

    def check(self, kept: Mapping[str, Any], where: str) -> None:
        """Raise FFMergeError, which names what differs, if a kept result is of another run.

        What an earlier version did not keep is not compared.

        Args:
            where: the argument and the file, which begin the error.
        """
        for name, now in self.items():
            if name in kept and kept[name] != now:
                values = [repr(value) for value in (kept[name], now)]
                shown = f": {values[0]} there, {values[1]} now" if max(map(len, values)) <= _SHORT else ""
                raise made_with(f"other {name}{shown}", where)


def made_with(other: str, where: str) -> FFMergeError:
    """The error for a kept result of another run."""
    return FFMergeError(f"{where} was made with {other}; give the same, another place, or --fresh (fresh=True)")


class Saved(Protocol):
    """What can be kept: `save` writes it with how far it goes."""

    def save(self, path: Path, **done: Any) -> None: ...


Sums = TypeVar("Sums", bound=Saved)


class RunningSums:
    """The sums that a run over calibration data keeps in a folder, saved when due, refused when of another run.

    A context manager, inside which no other process may use them. How far they go, and a hash of the data that was
    counted, is kept with them.

    Args:
        folder: `cache_dir`; None: nothing is kept.
        name: of the file; each rank has its own.
        save_seconds: how long a killed run may have to repeat.
        signature: what else decides them, beside what the sums themselves say.
        fresh: begin anew, whatever was kept.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        name: str,
        save_seconds: float,
        signature: Mapping[str, Any] | None = None,
        fresh: bool = False,
    ):
        self.path = Path(folder) / f"{file_of_rank(name)}.safetensors" if folder else None
        self._save_seconds, self._saved = save_seconds, time.monotonic()
        self._signature, self._fresh = Signature(signature or {}), fresh
        self._data, self._kept = Digest(), {}
        self._context = contextlib.ExitStack()

    def __enter__(self) -> RunningSums:
        if self.path is not None:
            self._context.enter_context(in_use(self.path, "cache_dir"))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.close()

    @property
    def data(self) -> str:
        """Hash of the batches that were taken so far."""
        return str(self._data)

    def resume(
        self, load: Callable[[Path], tuple[Sums, dict[str, Any]]], signature_of: Callable[[Sums], Mapping[str, Any]]
    ) -> tuple[Sums | None, dict[str, Any]]:
        """The sums that were kept and how far they go ("batches"); None and {} where there are none.

        Args:
            load: reads both from the file.
            signature_of: what sums say of the run that made them.

        Raises:
            FFMergeError: they are of another run.
        """
        if self.path is None or self._fresh or not self.path.exists():
            return None, {}
        found, self._kept = load(self.path)
        kept = self._kept.get("signature", {}) | dict(signature_of(found))
        self._signature.check(json.loads(json.dumps(kept)), f"cache_dir: {self.path}")
        return found, self._kept

    def watched(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches as they are.

        Raises:
            FFMergeError: the first ones, which the kept sums have counted, are others now.
        """
        counted, data = self._kept.get("batches", 0), self._kept.get("data")
        for batch in batches:
            self._data.add(batch)
            if self._data.count == counted and data not in (None, self.data):
                raise made_with(_OTHER_DATA, f"cache_dir: {self.path}")
            yield batch
        if data is not None and self._data.count < counted:
            raise made_with(_OTHER_DATA, f"cache_dir: {self.path}")

    def check(self, batches: Iterable[Any]) -> None:
        """Raise FFMergeError unless these are the batches that the kept sums have counted; reads no more of them."""
        for _ in islice(self.watched(batches), self._kept.get("batches", 0)):
            pass

    def save(self, sums: Saved) -> None:
        """Keep the sums of the batches that were taken so far."""
        if self.path is not None:
            sums.save(self.path, batches=self._data.count, data=self.data, signature=self._signature)
            self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether a killed run would have to repeat `save_seconds` or more."""
        return time.monotonic() - self._saved >= self._save_seconds

    def save_if_due(self, sums: Saved) -> None:
        """The same, at most every `save_seconds`."""
        if self.due():
            self.save(sums)


# ---------------------------------------------------------------------------------------------------------------- locks

_mine: set[tuple[Path, int]] = set()  # what each thread of this process holds


@contextlib.contextmanager
def in_use(path: str | os.PathLike, argument: str) -> Iterator[None]:
    """A file or folder that no other process may use inside the block, without what killed ones left of it.

    The lock of a process that died counts no more.

    Args:
        argument: that named the path, for the error.

    Raises:
        FFMergeError: it is in use (says by which process), or cannot be written.
    """
    path = Path(path).resolve()
    key = (path, threading.get_ident())
    if key in _mine:  # by a caller
        yield
        return
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    by = lock.with_suffix(".holder")
    new_parents = [parent for parent in lock.parents if not parent.exists()]
    release = _lock(lock, by, path, argument)
    _mine.add(key)
    try:
        remove_leftovers(*((path,) if path.is_dir() else (path.parent, path.name)))
        with contextlib.suppress(OSError):  # a full disk is told by what needs room
            by.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        _mine.discard(key)
        with contextlib.suppress(OSError):
            by.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
        release()
        with contextlib.suppress(OSError):  # not empty: something was kept there
            for parent in new_parents:
                parent.rmdir()


def _lock(lock: Path, by: Path, path: Path, argument: str) -> Callable[[], None]:
    """Lock a file; returns what frees it."""
    import filelock

    while True:
        held = filelock.FileLock(lock, timeout=0)
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
            before = lock.stat().st_ino
            held.acquire()
        except filelock.Timeout as error:
            raise FFMergeError(
                f"{argument}: {path} is in use by {_holder(by)}; wait for it, or give another"
            ) from error
        except FileNotFoundError:  # freed just now
            continue
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FFMergeError(f"{argument}: {path} cannot be locked ({reason}); give another place") from error
        with contextlib.suppress(FileNotFoundError):
            if lock.stat().st_ino == before:  # else its last holder removed the file that we have locked
                return held.release
        held.release()


def _holder(by: Path) -> str:
    with contextlib.suppress(OSError):
        return by.read_text().strip() or "another process"
    return "another process"
