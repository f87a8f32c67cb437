"""Settings as dataclass fields that carry their help text: one list for checks, signatures, flags and files."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

from .errors import FFMergeError

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Range:
    """The numbers that mean something; NaN, infinity and whole numbers beyond 64 bits never do."""

    at_least: float | None = None
    more_than: float | None = None
    at_most: float | None = None
    less_than: float | None = None

    def __contains__(self, value: float) -> bool:
        limits = (self.at_least, self.more_than, self.at_most, self.less_than)
        least, more, most, less = (value if limit is None else limit for limit in limits)
        within = least <= value <= most and (more < value or self.more_than is None)
        finite = abs(value) < 2**63 if isinstance(value, Integral) else math.isfinite(value)
        return finite and within and (value < less or self.less_than is None)

    def __str__(self) -> str:
        words = {"at_least": "at least", "more_than": "more than", "at_most": "at most", "less_than": "less than"}
        limits = [f"{word} {getattr(self, name):g}" for name, word in words.items() if getattr(self, name) is not None]
        return " and ".join(limits) or "a finite number of at most 64 bits"


class Option(NamedTuple):
    """One setting; `type` is that of a value which is not None, `choices` are empty where any value will do."""

    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[Any, ...]
    range: Range


def option(default: Any, help: str, choices: Iterable[Any] = (), also: Iterable[str] = (), **limits: float) -> Any:
    """A dataclass field with its help text.

    Args:
        choices: the values there are, None apart.
        also: names that others give it, answered with ours.
        limits: of a number, see `Range`.
    """
    metadata = {"help": help, "choices": tuple(choices), "also": tuple(also), "range": Range(**limits)}
    return field(default=default, metadata=metadata)


def options(settings: Any) -> tuple[Option, ...]:
    """The options of a settings class, in their order."""
    types = get_type_hints(settings)
    return tuple(
        Option(
            f.name, _value_type(types[f.name]), f.default, *(f.metadata[name] for name in ("help", "choices", "range"))
        )
        for f in fields(settings)
    )


def check(settings: Any) -> None:
    """Raise FFMergeError for a value that is none of its option's choices, or a number out of its range."""
    for known in options(type(settings)):
        value = getattr(settings, known.name)
        if known.choices and value not in (None, *known.choices):
            wanted = ", ".join(map(repr, known.choices)) + (" or None" if known.default is None else "")
            raise FFMergeError(f"{known.name}: got {value!r}, wanted one of {wanted}")
        if known.type in (int, float) and value is not None and not isinstance(value, Real):
            raise FFMergeError(f"{known.name}: got {value!r}, wanted a number, {known.range}")
        if isinstance(value, Real) and value not in known.range:
            raise FFMergeError(f"{known.name}: got {value}, wanted {known.range}")


def documented(cls: type) -> type:
    """Class decorator: the docstring goes on with a line for each option."""
    lines = [f"        {o.name}: {o.help}." for o in options(cls)]
    cls.__doc__ = "\n".join([f"{cls.__doc__ or ''}\n\n    Attributes:", *lines])
    return cls


def changed(settings: Settings, overrides: Mapping[str, Any], others: Iterable[str] = ()) -> Settings:
    """A copy of `settings` with other values; to read a mapping into a class, change its defaults: `changed(C(), ...)`.

    Args:
        others: further names that can be given where `overrides` come from; to suggest.

    Raises:
        FFMergeError: a name that is not a setting; with the nearest one there is.
    """
    names = {name: f.name for f in fields(settings) for name in (f.name, *f.metadata.get("also", ()))}
    known = {f.name for f in fields(settings)}
    for name in overrides:
        if name not in known:
            raise FFMergeError(f"unknown setting {name!r}: {_suggestion(name, names | {o: o for o in others})}")
    return replace(settings, **overrides)


def _suggestion(name: str, names: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {names[near[0]]!r}?" if near else f"wanted one of {', '.join(dict.fromkeys(names.values()))}"


def _value_type(hint: Any) -> Any:
    return get_args(hint)[0] if isinstance(hint, UnionType) else hint  # "int | None"
