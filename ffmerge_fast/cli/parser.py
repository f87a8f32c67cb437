"""The parser of all commands. Needs no torch, so that help, --version and usage errors are answered at once."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from typing import NoReturn

from .. import __version__
from . import commands
from .needs import check_needs
from .options import common_options
from .results import say

# In the order of use; other files of commands/ follow.
_ORDER = "demo inspect collect plan search merge finetune project fold eval export verify env".split()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments with the verb's `run`, and in `given` the names of those that were really typed.

    Raises:
        FFMergeError: an option that would do nothing beside the others.
        SystemExit: usage errors (2), help and --version (0).
    """
    args = parser().parse_args(argv)
    args.given = vars(args).keys() & args.defaults.keys()
    for name, value in args.defaults.items():
        if name not in args.given:
            setattr(args, name, value)
    check_needs(args)
    return args


def command_names() -> list[str]:
    """The verbs: one per file of commands/."""
    found = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    return sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs; what it gives holds what was typed, the verb's `run` and its `defaults`."""
    parser = _Parser(
        "ffmerge", description="Make trained Transformers smaller: merge feed-forward sublayers, project whole models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in command_names():
        command = importlib.import_module(f"{commands.__name__}.{name}")
        verb = verbs.add_parser(name, help=command.HELP, description=command.HELP)
        for add in (*command.OPTIONS, common_options):
            add(verb)
        verb.set_defaults(run=command.run, defaults=_without_defaults(verb))
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")

    def _print_message(self, message: str, file=None) -> None:
        """argparse's own passes over what cannot be written."""
        if file is not None:
            file.write(message)
        elif message:
            say(message.rstrip())


def _without_defaults(verb: argparse.ArgumentParser) -> dict[str, object]:
    """Take the defaults away, so that what is parsed is what was typed."""
    defaults = {}
    for action in verb._actions:
        if action.default is not argparse.SUPPRESS:
            defaults[action.dest], action.default = action.default, argparse.SUPPRESS
    return defaults
