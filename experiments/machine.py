"""What a measurement was made on: stands beside every figure that depends on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax


def machine() -> dict[str, str | int]:
    """Returns processor, cores, devices and versions.

    >>> sorted(machine())
    ['cores', 'devices', 'jax', 'jaxlib', 'processor', 'python']
    """
    devices = jax.devices()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
