"""What a measurement was made on: stands beside every figure that depends on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax


def machine() -> dict[str, str | int]:
    """Returns processor, cores, devices and versions; and those of a GPU of NVIDIA, if one is here.

    >>> {"cores", "devices", "jax", "jaxlib", "processor", "python"} <= set(machine())
    True
    """
    devices = jax.devices()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        **_gpu(),
    }


CUDA_PACKAGES = ("torch", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
"""Whose versions stand beside what was measured on a GPU, where they are installed."""


def _gpu() -> dict[str, str]:
    """The first GPU and its driver as `nvidia-smi` has them; nothing without one."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = found.stdout.strip().splitlines()
    if found.returncode or not lines:
        return {}
    name, _, driver = lines[0].partition(",")
    facts = {"gpu": name.strip(), "driver": driver.strip()}
    for package in CUDA_PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    named = processor_in(path.read_text()) if path.exists() else ""
    return named or platform.processor() or platform.machine()


def processor_in(text: str) -> str:
    """Returns the first processor of `/proc/cpuinfo`, empty if none is named there.

    Family and model stand beside the name, since virtual machines call generations of processors
    by one name, whose products differ by more than most techniques gain.

    >>> processor_in("cpu family\\t: 25\\nmodel\\t\\t: 17\\nmodel name\\t: AMD EPYC\\n")
    'AMD EPYC (family 25, model 17)'
    """
    pairs = (line.partition(":")[::2] for line in reversed(text.splitlines()))
    facts = {key.strip(): value.strip() for key, value in pairs}
    name = facts.get("model name", "")
    if name and {"cpu family", "model"} <= set(facts):
        return f"{name} (family {facts['cpu family']}, model {facts['model']})"
    return name
