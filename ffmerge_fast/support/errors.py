"""The one exception users meet: every mistake of a caller raises it with a single line that says what to do."""

from __future__ import annotations


class FFMergeError(ValueError):
    """A user's mistake. The message is one line: the argument, what was given, what is wanted, what to do."""
