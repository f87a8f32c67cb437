"""What this machine has: the C++ extension, the CPU's instruction sets, GPUs, free memory."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from . import env
from .errors import FFMergeError

if TYPE_CHECKING:  # torch is imported where it is asked, so that the command line's help need not wait for it
    import torch

CPU_ISAS = ("portable", "avx2", "avx512", "amx")
_EXTENSION = f"{__package__.partition('.')[0]}._C"


@cache
def load_extension() -> tuple[ModuleType | None, str | None]:
    """(the C++ extension, None), or (None, why it is not there)."""
    try:
        return importlib.import_module(_EXTENSION), None
    except ModuleNotFoundError:
        return None, "it was not built; with a C++17 compiler: pip install -v --force-reinstall --no-deps ."
    except ImportError as error:
        return None, str(error).partition("\n")[0]


def extension() -> ModuleType:
    """The C++ extension; ask `why_no_extension` first."""
    return load_extension()[0]


def why_no_extension() -> str | None:
    """None if the C++ extension can be imported, else the reason."""
    reason = load_extension()[1]
    return reason and f"the C++ extension is not built or does not load ({reason})"


def cpu_isa() -> str:
    """The instruction set for C++ kernels: `FFMERGE_CPU_ISA`, else the best that this CPU has; "none" without kernels.

    "amx-emulated", for tests, runs everywhere.

    Raises:
        FFMergeError: the forced one is unknown, the CPU lacks it, or the extension is not there.
    """
    return _choose_isa(env.forced_cpu_isa())


@cache
def cpu_isas() -> list[str]:
    """What this CPU and the extension can run, from the plainest to the best."""
    return extension().cpu_isas() if extension() else []


@cache
def _choose_isa(forced: str | None) -> str:
    usable = cpu_isas()
    if forced is None:
        return usable[-1] if usable else "none"
    if forced == env.AMX_EMULATED and usable:
        return forced
    if forced not in CPU_ISAS:
        raise FFMergeError(f"FFMERGE_CPU_ISA={forced!r} is not an instruction set: use one of {', '.join(CPU_ISAS)}")
    if not usable:
        reason = load_extension()[1]
        raise FFMergeError(f"FFMERGE_CPU_ISA={forced!r} needs the C++ extension, which is not loaded: {reason}")
    if forced not in usable:
        raise FFMergeError(f"FFMERGE_CPU_ISA={forced!r} cannot run on this CPU: use one of {', '.join(usable)}")
    return forced


def native_isa() -> str:
    """The same for kernels without AMX tiles: the best real one while AMX is emulated."""
    isa = cpu_isa()
    return cpu_isas()[-1] if isa == env.AMX_EMULATED else isa


def cpu_name() -> str:
    """The processor's marketing name, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int | None:
    """Cores this process may run on, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def gpus() -> list[dict]:
    """Name, compute capability and memory in GiB of every CUDA device that torch sees."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        devices.append({"name": device.name, "capability": f"{device.major}{device.minor}", "memory_gib": memory})
    return devices


def why_no_gpu() -> str | None:
    """None where torch sees a CUDA device, else the reason in one line."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, as far as the system tells."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = [_meminfo("MemAvailable"), _left_in_cgroup()]
    return min((f for f in free if f is not None), default=None)


def give_back_freed_memory() -> None:
    """Have this process return freed memory to the system at once, where the C library is GNU's, which keeps tensors
    of up to 32 MB for later: more than a small budget leaves."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 1 << 20)


def _meminfo(name: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:")), None)
    except OSError:
        return None


def _left_in_cgroup() -> int | None:
    """What a container's memory limit leaves (cgroup v2); page cache is counted as free, it is given back."""
    folder = "/sys/fs/cgroup"
    try:
        with open(f"{folder}/memory.max", encoding="ascii") as file:
            limit = int(file.read())
        with open(f"{folder}/memory.stat", encoding="ascii") as file:
            used = dict(line.split() for line in file)
        return limit - int(used["anon"])
    except (OSError, ValueError, KeyError):
        return None
