"""What the text of an argument stands for: numbers with a range, sizes, paths. Refused before any work, in one line."""

from __future__ import annotations

import os
import stat
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

from ..support.errors import FFMergeError
from ..support.settings import Range
from ..support.sizes import parse_bytes

_KINDS = {int: "a whole number", float: "a number"}


def number(kind: type, within: Range | None = None, **limits: float) -> Callable[[str], Any]:
    """A type of argument: an int or float within a `Range` or its limits."""
    allowed = within or Range(**limits)

    def parse(text: str) -> Any:
        wanted = ArgumentTypeError(f"got {shown(text)}, wanted {_KINDS[kind]}, {allowed}")
        try:
            value = kind(text)
        except ValueError:
            raise wanted from None
        if value not in allowed:
            raise wanted
        return value

    return parse


def numbers(within: Range) -> Callable[[str], list[int]]:
    """A type of argument: whole numbers with commas between them."""
    parse = number(int, within)
    return lambda text: [parse(part) for part in text.split(",")]


def size(text: str) -> int:
    """A number of bytes, such as 8GiB."""
    try:
        return parse_bytes(text, "size")
    except FFMergeError:
        message = f"got {shown(text)}, wanted a number of bytes of at least 1, or text such as '8GiB' or '500MB'"
        raise ArgumentTypeError(message) from None


def path(text: str) -> str:
    """A path that can name a file or folder, whether there is one or not."""
    _mode(text)
    return text


def file(text: str) -> str:
    """The path of a file that is there, or can be made."""
    if stat.S_ISDIR(_mode(text)):
        raise ArgumentTypeError(f"got {shown(text)}, which is a folder; wanted a file")
    return text


def folder(text: str) -> str:
    """The path of a folder that is there, or can be made."""
    if stat.S_ISREG(_mode(text)):
        raise ArgumentTypeError(f"got {shown(text)}, which is a file; wanted a folder")
    return text


def shown(text: str) -> str:
    """As it was given, on one line that can be read."""
    return repr(text if len(text) <= 200 else f"{text[:80]}...{text[-40:]}")


def _mode(text: str) -> int:
    """Of the file or folder there, 0 where there is none; refuses what no file can be called, pipes and devices."""
    try:
        mode = os.stat(os.path.expanduser(text)).st_mode if text else None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return 0
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentTypeError(f"got {shown(text)}, which cannot be a path ({reason})") from None
    if mode is None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        what = "which is a pipe or a device" if mode else "an empty path"
        raise ArgumentTypeError(f"got {shown(text)}, {what}; wanted a file or folder")
    return mode
