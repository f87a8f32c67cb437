"""Mirrors csrc/bindings.cpp."""

def cpu_isa() -> str:
    """The best instruction set this process can use: "portable", "avx2", "avx512" or "amx"."""

def cpu_isas() -> list[str]:
    """Every instruction set this process can use, lowest first; the last one is `cpu_isa()`."""
