"""Which backend runs an op: the fastest that can, or the one that was forced."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from ...support import env
from ...support.errors import FFMergeError

# A backend is a module with the op's functions and `can_run(tensor=None) -> None | reason`: without a tensor it answers
# for this machine, with the main input of a call for that call. It is found by the name of its file in ops/<op>/.
_FILES = {"triton": "triton_backend", "cpp": "cpp_backend", "reference": "reference"}
NAMES = tuple(_FILES)  # order of preference
_OPS = __package__.rpartition(".")[0]
_forced: str | None = None


@cache
def op_names() -> tuple[str, ...]:
    """The keys of all ops: the folders of ops/ with an op.py."""
    return tuple(sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/op.py")))


@cache
def modules_of(op: str) -> dict[str, str]:
    """{backend: its module} of the backends that an op has, in order of preference."""
    modules = {name: f"{_OPS}.{op}.{file}" for name, file in _FILES.items()}
    return {name: module for name, module in modules.items() if find_spec(module)}


def select(op: str, tensor=None) -> ModuleType:
    """The backend module for one call of `op` whose main input is `tensor`.

    Raises FFMergeError when a backend is forced (`use_backend`, FFMERGE_BACKEND) that cannot run it.
    """
    forced = _forced or env.forced_backend()
    if forced:
        reason = _why_not(op, forced, tensor)
        if reason:
            raise FFMergeError(f"backend {forced!r} is forced but cannot run op {op!r}: {reason}")
        return _load(modules_of(op)[forced])
    for module in map(_load, modules_of(op).values()):
        if module.can_run(tensor) is None:
            return module


def backends() -> dict[str, dict[str, str | None]]:
    """For each op, each backend: None if it can run on this machine, else the reason why not."""
    return {op: {name: _why_not(op, name, None) for name in NAMES} for op in op_names()}


class use_backend:
    """Force one backend for every op: `use_backend("reference")`, for good or as a context manager.

    `use_backend(None)` goes back to the automatic choice. It beats FFMERGE_BACKEND and holds for all threads.
    Raises FFMergeError for a name that is unknown, or that no op has.
    """

    def __init__(self, name: str | None):
        global _forced
        if name is not None:
            reasons = [_why_not(op, name, None) for op in op_names()]
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
    if name not in modules_of(op):
        return "not built for this op in this version"
    return _load(modules_of(op)[name]).can_run(tensor)


_load = cache(import_module)
