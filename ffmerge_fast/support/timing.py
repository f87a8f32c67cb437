"""How long the stages of a command took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Put the seconds that the block took under the stage's name."""
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started
