"""Running sums on disk, so that a killed run goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .distributed import file_of_rank
from .errors import FFMergeError


class Saved(Protocol):
    """What can be kept: `save` writes it with how far it goes."""

    def save(self, path: Path, **done: Any) -> None: ...


Sums = TypeVar("Sums", bound=Saved)


class RunningSums:
    """The sums that a run over calibration data keeps in a folder, saved when due, refused when of another run.

    Args:
        folder: `cache_dir`; None: nothing is kept.
        name: of the file; each rank has its own.
        save_seconds: how long a killed run may have to repeat.
    """

    def __init__(self, folder: str | os.PathLike | None, name: str, save_seconds: float):
        self.path = Path(folder) / f"{file_of_rank(name)}.safetensors" if folder else None
        self._save_seconds, self._saved = save_seconds, time.monotonic()

    def resume(
        self, load: Callable[[Path], tuple[Sums, dict[str, Any]]], unlike: Callable[[Sums], str]
    ) -> tuple[Sums | None, dict[str, Any]]:
        """The sums that were kept and how far they go; None and {} where there are none.

        Args:
            load: reads both from the file.
            unlike: what is other in the run that kept them ("another method"), "" for this one.

        Raises:
            FFMergeError: they are of another run.
        """
        if self.path is None or not self.path.exists():
            return None, {}
        found, done = load(self.path)
        if other := unlike(found):
            raise FFMergeError(f"cache_dir: {self.path} was begun with {other}; use another folder")
        return found, done

    def save(self, sums: Saved, **done: Any) -> None:
        """Keep the sums and how far they go."""
        if self.path is not None:
            sums.save(self.path, **done)
            self._saved = time.monotonic()

    def save_if_due(self, sums: Saved, **done: Any) -> None:
        """The same, at most every `save_seconds`."""
        if time.monotonic() - self._saved >= self._save_seconds:
            self.save(sums, **done)
