"""What this process is before a command runs: quiet or not, seeded, on its device, one of a torchrun job."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from ..support.env import allow_network
from ..support.errors import FFMergeError
from ..support.progress import set_quiet
from .results import say


def set_up(args: argparse.Namespace) -> None:
    """Do what the options of all commands ask for; `args.device` becomes this process's.

    Raises:
        FFMergeError: a device that this machine does not have; environment variables of half a torchrun job.
    """
    set_quiet(args.quiet or args.json)
    if args.online:
        allow_network()
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.quiet or args.json or not (sys.stderr and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers heeds it too
    if not args.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_, **__: args.quiet or say(f"warning: {message}")
    import torch

    torch.manual_seed(args.seed)
    if getattr(args, "place", None) == "cuda" and "device" not in args.given:
        args.device = "cuda"
    job = not torch.distributed.is_initialized() and _in_job(args.device)
    if job and args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    _check_device(args.device)
    if job:
        _join_job(args.device)


def leave_job() -> None:
    """Leave the process group, if there is one."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _check_device(name: str) -> None:
    import torch

    reason = ""
    try:
        if torch.device(name).type != "meta":
            reason = "this machine does not have it"
            torch.empty(0, device=name)
            return
    except Exception as error:  # of many kinds, by backend
        cause = error
    else:
        cause = None
    raise FFMergeError(
        f"--device: got {name!r}, wanted 'cpu', 'cuda' or 'cuda:<n>'" + (reason and f"; {reason}")
    ) from cause


def _in_job(device: str) -> bool:
    """Whether torchrun started this process beside others."""
    environ = os.environ
    if (environ.get("WORLD_SIZE") or "1") == "1":
        return False
    numbers = {"WORLD_SIZE", "RANK", "MASTER_PORT"} | ({"LOCAL_RANK"} if device == "cuda" else set())
    wrong = sorted(name for name in numbers if not environ.get(name, "").isdecimal())
    if "MASTER_ADDR" not in environ:
        wrong.append("MASTER_ADDR")
    if not wrong and not int(environ["RANK"]) < int(environ["WORLD_SIZE"]):
        wrong.append("RANK")
    if wrong:
        raise FFMergeError(
            f"{wrong[0]}: got {environ.get(wrong[0], 'nothing')!r} beside WORLD_SIZE={environ['WORLD_SIZE']}, wanted "
            "what torchrun sets; start with torchrun, or unset WORLD_SIZE"
        )
    return True


def _join_job(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    try:
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FFMergeError(f"the torchrun job cannot be joined ({reason}); start with torchrun") from error
