"""This machine: its memory, and what is worth knowing of it beside the figures."""

import math
import os
import platform
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

__all__ = ["describe", "forget_peak", "peak_megabytes", "resident_megabytes", "warm_memory"]

_STEP = 256 << 20
_STATUS = Path("/proc/self/status")


def warm_memory(most: int) -> float:
    """Touch up to `most` bytes, never more than 60 % of what is available, and give them back; the seconds it took.

    On a virtual machine the first touch of memory goes through the hypervisor (0.5 GB/s where it was measured, 7 the
    second time), so the first 640 MB anyone reads would measure that.
    """
    start = perf_counter()
    blocks = [np.ones(_STEP, dtype=np.uint8) for _ in range(0, min(most, int(_available_bytes() * 0.6)), _STEP)]
    del blocks
    return perf_counter() - start


def describe() -> dict[str, Any]:
    """Load and copy speed show how quiet the machine was; no name or address of it is kept."""
    source = np.ones(128 << 20, dtype=np.uint8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(5):
        start = perf_counter()
        np.copyto(target, source)
        seconds.append(perf_counter() - start)
    return {
        "processors": os.cpu_count(),
        "load": os.getloadavg(),
        "copy_gb_per_s": source.nbytes / min(seconds) / 1e9,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def resident_megabytes(process: int) -> float:
    """RSS of the process and its descendants, 10^6 bytes. NaN where there is no /proc (anything but Linux)."""
    return _status_megabytes(process, "VmRSS")


def peak_megabytes(process: int) -> float:
    """Highest RSS since the start or the last `forget_peak`: the sum of each process's own peak."""
    return _status_megabytes(process, "VmHWM")


def forget_peak(process: int) -> None:
    """Begin a new peak from what is resident now."""
    for each in _family(process):
        Path(f"/proc/{each}/clear_refs").write_text("5")


def _status_megabytes(process: int, field: str) -> float:
    family = _family(process)
    total = 0 if family else math.nan
    for each in family:
        lines = Path(f"/proc/{each}/status").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    return total * 1024 / 1e6


def _family(process: int) -> list[int]:
    """The process and its descendants, parents first; nobody where there is no /proc."""
    family = [process] if _STATUS.exists() else []
    for parent in family:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            family.extend(int(child) for child in children.read_text().split())
    return family


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 2 << 30
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024
