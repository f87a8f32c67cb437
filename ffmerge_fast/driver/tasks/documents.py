"""Documents: texts in memory or in files, read a piece at a time, and never anything that is no text."""

from __future__ import annotations

import codecs
import gzip
import os
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from ...support.errors import FFMergeError

_BYTES = 1 << 20  # read at once
_BORDER = 1 << 16  # characters in which a line's end is looked for when a document is divided


class Document:
    """The characters `start` to `stop` of a text in memory or of a text file.

    A file is UTF-8, or UTF-16 with a byte order mark, which is no part of the text; it may be packed by gzip. Its lines
    end with "\\n" or "\\r\\n" (read as "\\n"); a carriage return elsewhere is a character.

    Args:
        source: the text, or the path of its file.
    """

    def __init__(self, source: str | Path, start: int = 0, stop: int | None = None):
        self.source, self.start, self.stop = source, start, stop

    def __iter__(self) -> Iterator[str]:
        """The text in parts of about a megabyte.

        Raises:
            FFMergeError: the file cannot be read or is no text.
        """
        position = 0
        for part in self._parts():
            inside = part[max(0, self.start - position) : None if self.stop is None else max(0, self.stop - position)]
            if inside:
                yield inside
            position += len(part)
            if self.stop is not None and position >= self.stop:
                return

    @property
    def length(self) -> int:
        """In characters."""
        return self._measured[0]

    @property
    def blank(self) -> bool:
        """Whether there is nothing but white space in it."""
        return self._measured[1]

    def is_text(self) -> bool:
        """Whether a file is text at all."""
        try:
            return self.length >= 0
        except _NoText:
            return False

    def text(self) -> str:
        """All of it."""
        return "".join(self)

    def divide(self, at: int) -> tuple[Document, Document]:
        """What stands before and after character `at`, or the end of its line if that is near, or of its word."""
        ahead = next(iter(Document(self.source, self.start + at, self.stop)), "")[:_BORDER]
        border = self.start + at + (ahead.find("\n") + 1 or ahead.find(" ") + 1)
        return Document(self.source, self.start, border), Document(self.source, border, self.stop)

    @cached_property
    def _measured(self) -> tuple[int, bool]:
        length, blank = 0, True
        for part in self:
            length, blank = length + len(part), blank and part.isspace()
        return length, blank

    def _parts(self) -> Iterator[str]:
        if isinstance(self.source, str):
            return (self.source[i : i + _BYTES] for i in range(0, len(self.source), _BYTES))
        return _decoded(self.source)


class _NoText(FFMergeError):
    """A file of something else."""


def existing(path: str | os.PathLike, what: str) -> Path:
    """`path` as a Path, or FFMergeError if there is no file or folder."""
    path = Path(path).expanduser()
    try:
        if path.is_file() or path.is_dir():
            return path
        reason = "is neither a file nor a folder" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:
        reason = f"is no path ({error})"
    raise FFMergeError(f"{what}: {path} {reason}; give an existing file or folder")


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file; a part never ends between "\\r" and "\\n"."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as file:
            data, held = file.read(_BYTES), ""
            decoder = codecs.getincrementaldecoder(_encoding(data))()
            while True:
                text = held + decoder.decode(data, final=not data)
                held = "\r" if text.endswith("\r") and data else ""
                if "\0" in text:
                    raise _NoText(f"text data: {path} is no text: there are NUL characters in it")
                yield text[: len(text) - len(held)].replace("\r\n", "\n")
                if not data:
                    return
                data = file.read(_BYTES)
    except UnicodeDecodeError as error:
        raise _NoText(f"text data: {path} is no text: not UTF-8 (nor UTF-16 with a byte order mark)") from error
    except (OSError, EOFError, zlib.error) as error:
        raise FFMergeError(f"text data: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _encoding(beginning: bytes) -> str:
    return "utf-16" if beginning[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
