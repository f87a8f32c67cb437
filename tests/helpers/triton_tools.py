"""Triton kernels without a GPU: run by the interpreter, and compiled for sm_90."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'ffmerge_fast[gpu]'"
)
SHARED_BYTES = 227 * 1024  # of one block on sm_90


def run_in_the_interpreter(name: str) -> None:
    """Run tests of tests/ops in a process of their own: the variable is to be set before triton is imported."""
    installed = tuple(int(n) for n in version("triton").split(".")[:2])
    if installed < (3, 9):  # 3.6 fails at range loops with NumPy 2.4 and newer
        pytest.skip(f"triton {version('triton')}: the interpreter is known to work from 3.9 on")
    options = "-q -x -n 0 -p no:cacheprovider -p no:hypothesispytest -p tests.helpers.interpreter".split()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(REPOSITORY / "tests" / "ops" / name)],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1", "FFMERGE_BACKEND": "triton"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def compile_for_hopper(kernel, arguments, constants, num_warps, num_stages=3, aligned=()):
    """(shared bytes, PTX, registers, stack bytes) of a kernel for sm_90; a stack means spilled registers.

    aligned: names of integers that are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = arguments | dict.fromkeys(constants, "constexpr")
    names = list(signature)
    divisible = [["tt.divisibility", 16]]
    attrs = {}
    for name, kind in arguments.items():
        if isinstance(kind, tuple):
            attrs |= {(names.index(name), i): divisible for i in range(len(kind))}
        elif kind.startswith("*") or name in aligned:
            attrs[names.index(name),] = divisible
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    return compiled.metadata.shared, compiled.asm["ptx"], *_registers(triton, compiled.asm["cubin"])


def _registers(triton, cubin):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"no {tool.name} in this triton: registers cannot be read")
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"ffmerge-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    try:
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    finally:
        path.unlink()
    return (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
