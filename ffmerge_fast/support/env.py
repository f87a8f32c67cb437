"""Environment variables (all of them) and optional packages."""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

from .errors import FFMergeError

AMX_EMULATED = "amx-emulated"  # FFMERGE_CPU_ISA for tests: the schedule of AMX, its instructions emulated
_TRUE = {"1", "true", "yes", "on"}


def forced_backend() -> str | None:
    """`FFMERGE_BACKEND`: run every op on this backend, or fail with the reason."""
    return os.environ.get("FFMERGE_BACKEND") or None


def forced_cpu_isa() -> str | None:
    """`FFMERGE_CPU_ISA`: portable, avx2, avx512 or amx, instead of the best one the CPU has."""
    return os.environ.get("FFMERGE_CPU_ISA") or None


def online() -> bool:
    """`FFMERGE_ONLINE`: allow downloads from the Hugging Face hub. Off by default."""
    return os.environ.get("FFMERGE_ONLINE", "").lower() in _TRUE


@cache
def triton_interpreter() -> bool:
    """`TRITON_INTERPRET`, Triton's own: kernels run in Python on CPU tensors; to be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


def allow_network() -> None:
    """Turn `FFMERGE_ONLINE` on for this process (the command line's `--online`)."""
    os.environ["FFMERGE_ONLINE"] = "1"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FFMergeError(
            f"this needs the package {module.partition('.')[0]!r}: pip install 'ffmerge_fast[{extra}]' ({error})"
        ) from error
