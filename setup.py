"""Builds the optional C++ extension; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build


class FreshBuild(build):
    """A wheel holds what the sources hold now: what an earlier build left in build/lib* is dropped first."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def extensions() -> list[Extension]:
    """`ffmerge_fast._C`. A failed compilation is a warning (`optional`): the package then runs on plain PyTorch."""
    try:
        import pybind11
    except ImportError:
        warnings.warn("pybind11 is missing: installing without the C++ extension", stacklevel=1)
        return []
    flags = ["/std:c++17", "/O2"] if sys.platform == "win32" else ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
    threads = [] if sys.platform == "win32" else ["-pthread"]
    sources = sorted(path.as_posix() for path in Path("csrc").rglob("*.cpp"))
    headers = sorted(path.as_posix() for suffix in ("*.h", "*.inc") for path in Path("csrc").rglob(suffix))
    return [
        Extension(
            "ffmerge_fast._C",
            sources,
            include_dirs=["csrc", pybind11.get_include()],
            depends=headers,
            extra_compile_args=flags + threads,
            extra_link_args=threads,
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build": FreshBuild})
