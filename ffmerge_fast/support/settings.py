"""Settings as dataclass fields that carry their help text: one list for checks, signatures, flags and files."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import field, fields, replace
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

from .errors import FFMergeError

Settings = TypeVar("Settings")


class Option(NamedTuple):
    """One setting; `type` is that of a value which is not None, `choices` are empty where any value will do."""

    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[Any, ...]


def option(default: Any, help: str, choices: Iterable[Any] = (), also: Iterable[str] = ()) -> Any:
    """A dataclass field with its help text.

    Args:
        choices: the values there are, None apart.
        also: names that others give it, answered with ours.
    """
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "also": tuple(also)})


def options(settings: Any) -> tuple[Option, ...]:
    """The options of a settings class, in their order."""
    types = get_type_hints(settings)
    return tuple(
        Option(f.name, _value_type(types[f.name]), f.default, f.metadata["help"], f.metadata.get("choices", ()))
        for f in fields(settings)
    )


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
