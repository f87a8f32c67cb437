"""Numbers of bytes as people write and read them: "8GiB" <-> 8589934592."""

from __future__ import annotations

import re

from .errors import FFMergeError

_POWERS = {prefix: power for power, prefix in enumerate("kmgt", 1)}
_UNITS = {"": 1, "b": 1} | {f"{p}{b}": 1000**i for p, i in _POWERS.items() for b in ("", "b")}
_UNITS |= {f"{p}i{b}": 1024**i for p, i in _POWERS.items() for b in ("", "b")}


def parse_bytes(value: int | str, name: str) -> int:
    """8589934592, "8GiB" or "500 MB" as a number of bytes.

    Args:
        name: of the argument, for the error.

    Raises:
        FFMergeError: anything else, or nothing positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", str(value).strip().lower())
    if isinstance(value, bool) or not match or match[2] not in _UNITS or not float(match[1]):
        raise FFMergeError(f"{name}: got {value!r}, want a number of bytes or text such as '8GiB' or '500MB'")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(n: float) -> str:
    """12_345_678 -> '12.3 MB' (powers of 1000, as on disks)."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(n) >= 1000 and len(units) > 1:
        n, units = n / 1000, units[1:]
    return f"{n:.0f} B" if units[0] == "B" else f"{n:.1f} {units[0]}"
