"""What is installed and what this machine can do: the text of `ffmerge env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

from ..ops.common import backends
from ..support import machine

# Distribution names, as in pyproject.toml.
_EXTRAS = {
    "hf": ("transformers", "tokenizers", "sentencepiece", "accelerate"),
    "driver": ("tqdm", "pyyaml", "matplotlib", "sacrebleu", "datasets", "pillow", "scikit-learn", "rich"),
    "test": ("pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "ruff"),
    "gpu": ("triton",),
}
_BASE = ("torch", "numpy", "scipy", "safetensors", "lazy_loader", "filelock")


def report() -> dict:
    """Versions, the C++ extension, the CPU's instruction sets, GPUs, threads and extras, as plain JSON types.

    Raises:
        FFMergeError: `FFMERGE_CPU_ISA` names no instruction set, or one that this process cannot use.
    """
    extension, reason = machine.load_extension()
    return {
        "ffmerge_fast": _version("ffmerge_fast"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*_BASE, *_EXTRAS["hf"], *_EXTRAS["gpu"])},
        "extension": {"loaded": extension is not None, "path": getattr(extension, "__file__", None), "reason": reason},
        "cpu": _cpu(),
        "gpu": _gpu(),
        "backends": backends.backends(),
        "extras": {name: _extra(name) for name in _EXTRAS},
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith("FFMERGE_")},
    }


def format_report(report: dict) -> str:
    """`report()` as text, one fact per line."""
    extension, cpu, gpu = report["extension"], report["cpu"], report["gpu"]
    lines = [
        ("ffmerge_fast", report["ffmerge_fast"] or "not installed (imported from a folder)"),
        ("python", f"{report['python']} on {report['platform']}"),
        *((name, version or "not installed") for name, version in report["packages"].items()),
        ("C++ extension", extension["path"] if extension["loaded"] else f"not loaded: {extension['reason']}"),
        ("CPU", f"{cpu['name']}, {cpu['usable_cores']} cores usable, torch uses {cpu['torch_threads']} threads"),
        ("CPU ISA", f"{cpu['isa']} (available: {', '.join(cpu['isas']) or 'none'})"),
        *(("GPU", f"{d['name']}, sm_{d['capability']}, {d['memory_gib']:.0f} GiB") for d in gpu["devices"]),
    ]
    if not gpu["devices"]:
        lines.append(("GPU", f"none: {gpu['reason']}"))
    for op, available in report["backends"].items():
        lines.append((f"op {op}", ", ".join(name for name, reason in available.items() if reason is None)))
    for name, extra in report["extras"].items():
        missing = f"missing {', '.join(extra['missing'])}: {extra['install']}"
        lines.append((f"extra {name}", missing if extra["missing"] else "installed"))
    lines += list(report["variables"].items())
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict:
    import torch

    return {
        "name": machine.cpu_name(),
        "usable_cores": machine.usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "isa": machine.cpu_isa(),
        "isas": machine.cpu_isas(),
    }


def _gpu() -> dict:
    import torch

    devices = machine.gpus()
    return {"cuda": torch.version.cuda, "devices": devices, "reason": None if devices else machine.why_no_gpu()}


def _extra(name: str) -> dict:
    missing = [distribution for distribution in _EXTRAS[name] if _version(distribution) is None]
    return {"missing": missing, "install": f"pip install 'ffmerge_fast[{name}]'"}
