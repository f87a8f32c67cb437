"""Which backend runs an op: the fastest that can, or the one that was forced."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from . import _env
from ._errors import FFMergeError

NAMES = ("triton", "cpp", "reference")  # order of preference
OPS = ("correlation", "assignment", "shared_ffn", "projection")

# A backend is a module with the op's functions and `can_run(tensor=None) -> None | reason`: without a tensor it answers
# for this machine, with the main input of a call for that call.
_MODULES = {op: {"reference": f"ops.{op}.reference"} for op in OPS}
_MODULES["assignment"]["cpp"] = "ops.assignment.cpp_backend"
_MODULES["correlation"]["cpp"] = "ops.correlation.cpp_backend"
_MODULES["shared_ffn"]["cpp"] = "ops.shared_ffn.cpp_backend"
_MODULES["correlation"]["triton"] = "ops.correlation.triton_backend"
_MODULES["shared_ffn"]["triton"] = "ops.shared_ffn.triton_backend"
_MODULES["projection"]["cpp"] = "ops.projection.cpp_backend"
_MODULES["projection"]["triton"] = "ops.projection.triton_backend"
_forced: str | None = None


def select(op: str, tensor=None) -> ModuleType:
    """The backend module for one call of `op` whose main input is `tensor`.

    Raises FFMergeError when a backend is forced (`use_backend`, FFMERGE_BACKEND) that cannot run it.
    """
    forced = _forced or _env.forced_backend()
    if forced:
        reason = _why_not(op, forced, tensor)
        if reason:
            raise FFMergeError(f"backend {forced!r} is forced but cannot run op {op!r}: {reason}")
        return _load(_MODULES[op][forced])
    modules = _MODULES[op]
    for name in NAMES:
        if name in modules and (module := _load(modules[name])).can_run(tensor) is None:
            return module


def backends() -> dict[str, dict[str, str | None]]:
    """For each op, each backend: None if it can run on this machine, else the reason why not."""
    return {op: {name: _why_not(op, name, None) for name in NAMES} for op in OPS}


class use_backend:
    """Force one backend for every op: `use_backend("reference")`, for good or as a context manager.

    `use_backend(None)` goes back to the automatic choice. It beats FFMERGE_BACKEND and holds for all threads.
    Raises FFMergeError for a name that is unknown, or that no op has.
    """

    def __init__(self, name: str | None):
        global _forced
        if name is not None:
            reasons = [_why_not(op, name, None) for op in OPS]
            if all(reasons):
                raise FFMergeError(f"cannot use backend {name!r}: {reasons[0]}")
        self._previous = _forced
        _forced = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc) -> None:
        global _forced
        _forced = self._previous


def _why_not(op: str, name: str, tensor) -> str | None:
    if name not in NAMES:
        return f"unknown backend, choose one of {', '.join(NAMES)}"
    if name not in _MODULES[op]:
        return "not built for this op in this version"
    return _load(_MODULES[op][name]).can_run(tensor)


def extension() -> ModuleType:
    """The C++ extension; ask `why_no_extension` first."""
    return _load("_C")


@cache
def why_no_extension() -> str | None:
    """None if the C++ extension can be imported, else the reason."""
    try:
        extension()
    except ImportError as error:
        return f"the C++ extension is not built or does not load ({str(error).splitlines()[0]})"
    return None


def cpu_isa() -> str:
    """The instruction set for C++ kernels: FFMERGE_CPU_ISA, or the best that this CPU has.

    Raises FFMergeError when one is forced that the CPU lacks. "amx-emulated", for tests, runs everywhere.
    """
    return _usable_isa(_env.forced_cpu_isa())


@cache
def _usable_isa(forced: str | None) -> str:
    if forced is None:
        return extension().cpu_isa()
    usable = extension().cpu_isas()
    if forced not in [*usable, _env.AMX_EMULATED]:
        raise FFMergeError(f"FFMERGE_CPU_ISA: got {forced!r}, want one this CPU has: {', '.join(usable)}")
    return forced


def native_isa() -> str:
    """The same for kernels without AMX tiles: the best real one while AMX is emulated."""
    isa = cpu_isa()
    return extension().cpu_isa() if isa == _env.AMX_EMULATED else isa


@cache
def _load(path: str) -> ModuleType:
    return import_module(f".{path}", __package__)
