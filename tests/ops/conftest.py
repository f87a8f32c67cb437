"""Ops are tested on every backend and instruction set of the machine."""

import pytest

from ffmerge_fast import _backend

BACKENDS = ["reference", "cpp portable", "cpp avx2", "cpp avx512", "cpp amx", "cpp amx-emulated"]


@pytest.fixture(params=BACKENDS, scope="module")
def op_backend(request):
    """Every test runs on every backend and instruction set of this machine, forced in turn."""
    name, _, isa = request.param.partition(" ")
    if name == "cpp":
        if reason := _backend.why_no_extension():
            pytest.skip(reason)
        usable = _backend.extension().cpu_isas()
        if isa not in [*usable, "amx-emulated"]:
            pytest.skip(f"this CPU has no {isa.upper()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FFMERGE_BACKEND", name)
        patch.setenv("FFMERGE_CPU_ISA", isa or "portable")
        if not isa:
            patch.delenv("FFMERGE_CPU_ISA")
        yield request.param


@pytest.fixture(scope="module")
def correlation_backend(op_backend):
    return op_backend
