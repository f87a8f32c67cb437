"""What is installed and what this machine can do: the text of `ffmerge env`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from types import ModuleType

from . import _backend, _env
from ._errors import FFMergeError

_CPU_ISAS = ("portable", "avx2", "avx512", "amx")

# Distribution names, as in pyproject.toml.
_EXTRAS = {
    "hf": ("transformers", "tokenizers", "sentencepiece", "accelerate"),
    "driver": ("tqdm", "pyyaml", "matplotlib", "sacrebleu", "datasets", "pillow", "scikit-learn", "rich"),
    "test": ("pytest", "pytest-benchmark", "hypothesis", "ruff"),
    "gpu": ("triton",),
}
_BASE = ("torch", "numpy", "scipy", "safetensors")


def report() -> dict:
    """Versions, the C++ extension, the CPU's instruction sets, GPUs, threads and extras, as plain JSON types.

    Raises:
        FFMergeError: `FFMERGE_CPU_ISA` names no instruction set, or one that this process cannot use.
    """
    extension, reason = _load_extension()
    return {
        "ffmerge_fast": _version("ffmerge_fast"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*_BASE, *_EXTRAS["hf"], *_EXTRAS["gpu"])},
        "extension": {"loaded": extension is not None, "path": getattr(extension, "__file__", None), "reason": reason},
        "cpu": _cpu(extension),
        "gpu": _gpu(),
        "backends": _backend.backends(),
        "extras": {name: _extra(name) for name in _EXTRAS},
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith("FFMERGE_")},
    }


def cpu_isa() -> str:
    """The instruction set the C++ kernels run on: `FFMERGE_CPU_ISA`, else the best one; "none" without the extension.

    Raises:
        FFMergeError: the forced one is unknown, the CPU lacks it, or the extension is not there.
    """
    extension, reason = _load_extension()
    return _choose_isa(_env.forced_cpu_isa(), extension.cpu_isas() if extension else [], reason)


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
    for op, backends in report["backends"].items():
        lines.append((f"op {op}", ", ".join(name for name, reason in backends.items() if reason is None)))
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


def _load_extension() -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why it is not there)."""
    try:
        return importlib.import_module("ffmerge_fast._C"), None
    except ModuleNotFoundError:
        return None, "it was not built; with a C++17 compiler: pip install -v --force-reinstall --no-deps ."
    except ImportError as error:
        return None, str(error).partition("\n")[0]


def _choose_isa(forced: str | None, usable: list[str], reason: str | None) -> str:
    if forced is None:
        return usable[-1] if usable else "none"
    if forced == _env.AMX_EMULATED and usable:
        return forced
    if forced not in _CPU_ISAS:
        raise FFMergeError(f"FFMERGE_CPU_ISA={forced!r} is not an instruction set: use one of {', '.join(_CPU_ISAS)}")
    if not usable:
        raise FFMergeError(f"FFMERGE_CPU_ISA={forced!r} needs the C++ extension, which is not loaded: {reason}")
    if forced not in usable:
        raise FFMergeError(f"FFMERGE_CPU_ISA={forced!r} cannot run on this CPU: use one of {', '.join(usable)}")
    return forced


def _cpu(extension: ModuleType | None) -> dict:
    import torch

    return {
        "name": cpu_name(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "isa": cpu_isa(),
        "isas": extension.cpu_isas() if extension else [],
    }


def cpu_name() -> str:
    """The processor's marketing name, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> dict:
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        devices.append({"name": device.name, "capability": f"{device.major}{device.minor}", "memory_gib": memory})
    return {"cuda": torch.version.cuda, "devices": devices, "reason": None if devices else why_no_gpu()}


def why_no_gpu() -> str | None:
    """None where torch sees a CUDA device, else the reason in one line."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _extra(name: str) -> dict:
    missing = [distribution for distribution in _EXTRAS[name] if _version(distribution) is None]
    return {"missing": missing, "install": f"pip install 'ffmerge_fast[{name}]'"}
