"""What the numbers of a benchmark were measured on."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headprobe.callbacks.identity import versions


def describe() -> dict[str, Any]:
    """Return date, processor, cores, memory and versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _first("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "bfloat16": bfloat16(),
        "system": platform.system(),
        "versions": versions(),
    }


def bfloat16() -> str:
    """Return the bfloat16 matrix instructions that the processor lists: without any, bfloat16 is emulated."""
    listed = (_first("flags") or _first("Features")).split()
    if not listed:
        return "not known"
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in listed]
    return ", ".join(found) or "none"


def line(machine: dict[str, Any], threads: int) -> str:
    """Return the machine in one line, for above the tables."""
    kinds = machine["versions"]
    packages = ", ".join(f"{name} {kinds[name]}" for name in ("torch", "timm", "headprobe_source"))
    return (
        f"{machine['date'][:10]}, {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{threads} threads, bfloat16 instructions: {machine['bfloat16']}, {packages}"
    )


def _first(name: str) -> str:
    """Return the first value that /proc/cpuinfo has under a name, or nothing where there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
