"""The `ffmerge` command: finds its verbs, parses arguments, runs a verb, prints what it gives. No logic lives here.

Nothing that is imported before a verb runs needs torch, so that help, --version and usage errors are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pkgutil
import sys
import traceback
import warnings

from .. import __version__
from ..support.env import allow_network
from ..support.progress import set_quiet
from . import commands
from .inputs import Inputs
from .options import common_options
from .outputs import check_outputs
from .results import is_first_rank, one_line

# In the order of use; other files of commands/ follow.
_ORDER = "demo inspect collect plan search merge finetune project fold eval export verify env".split()


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a mistake or failure (one line on stderr), 2 for usage."""
    args = parser().parse_args(argv)
    _set_up(args)
    try:
        check_outputs(args)
        result = args.run(args, Inputs(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    finally:
        _close_distributed()
    if is_first_rank():
        result.print(args.json)
    return 0


def command_names() -> list[str]:
    """The verbs: one per file of commands/."""
    found = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    return sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs; the arguments it gives have the verb's `run`."""
    parser = argparse.ArgumentParser(
        "ffmerge", description="Make trained Transformers smaller: merge feed-forward sublayers, project whole models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in command_names():
        command = importlib.import_module(f"{commands.__name__}.{name}")
        verb = verbs.add_parser(name, help=command.HELP, description=command.HELP)
        for add in (*command.OPTIONS, common_options):
            add(verb)
        verb.set_defaults(run=command.run)
    return parser


def _set_up(args: argparse.Namespace) -> None:
    set_quiet(args.quiet or args.json)
    if args.online:
        allow_network()
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.quiet or args.json or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers heeds it too
    if not args.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_, **__: args.quiet or print(f"warning: {message}", file=sys.stderr)
    import torch

    torch.manual_seed(args.seed)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():  # under torchrun
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def _close_distributed() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
