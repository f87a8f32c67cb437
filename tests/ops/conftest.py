"""Ops with C++ kernels are tested on every backend and instruction set of the machine."""

import pytest

from ffmerge_fast.support import machine

BACKENDS = ["reference", "cpp portable", "cpp avx2", "cpp avx512", "cpp amx", "cpp amx-emulated"]


def _forced(name):
    """Force a backend and an instruction set ("cpp avx2") by the environment while a test runs, or skip it."""
    backend, _, isa = name.partition(" ")
    if backend == "cpp":
        if reason := machine.why_no_extension():
            pytest.skip(reason)
        if isa not in [*machine.extension().cpu_isas(), "amx-emulated"]:
            pytest.skip(f"this CPU has no {isa.upper()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FFMERGE_BACKEND", backend)
        patch.setenv("FFMERGE_CPU_ISA", isa or "portable")
        if not isa:
            patch.delenv("FFMERGE_CPU_ISA")
        yield name


@pytest.fixture(params=BACKENDS, scope="module")
def op_backend(request):
    """Every test runs on every backend and instruction set of this machine, forced in turn."""
    yield from _forced(request.param)


@pytest.fixture(scope="module")
def correlation_backend(op_backend):
    return op_backend


@pytest.fixture(params=BACKENDS)
def shared_ffn_backend(request):
    """The same, test by test."""
    yield from _forced(request.param)
