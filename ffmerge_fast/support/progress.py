"""Progress bars: tqdm on standard error where it is installed and wanted, silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Switch all bars off (`-q`, `--json`) or on."""
    global _quiet
    _quiet = quiet


class _Silent:
    """Takes tqdm's place when no bar is shown."""

    def __init__(self, iterable: Iterable | None = None):
        self._iterable = iterable if iterable is not None else ()

    def __iter__(self):
        return iter(self._iterable)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def update(self, n: int = 1) -> None: ...

    def set_postfix(self, **values) -> None: ...

    def close(self) -> None: ...


def progress(iterable: Iterable | None = None, total: int | None = None, desc: str = "", unit: str = "it"):
    """A bar over `iterable`, or one moved by `.update(n)`; on terminals, for what takes longer than two seconds."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _Silent(iterable)
    if _quiet:
        return _Silent(iterable)
    shape = {"unit": unit, "unit_scale": unit == "B", "dynamic_ncols": True}
    return tqdm(iterable, total=total, desc=desc, delay=2, leave=False, disable=None, **shape)
