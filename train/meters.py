"""What a run costs: seconds by kind, processor time, energy, and how much of the chip it uses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import jax

# Dense peaks of matrix products in bfloat16, operations a second, by `device_kind`: the makers'
# data sheets, without sparsity (989e12 for an H100 SXM; twice that is with it).
PEAK_FLOPS: dict[str, float] = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
RAPL = Path("/sys/class/powercap")


class Clock:
    """Adds up wall-clock seconds by what they went into.

    >>> clock = Clock()
    >>> with clock("data"):
    ...     pass
    >>> sorted(clock.seconds), clock.seconds["data"] < 1
    (['data'], True)
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.start


def utilization(flops_per_second: float) -> float | None:
    """Returns the fraction of the peak of all devices, or None where the peak is not known."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else flops_per_second / (peak * jax.device_count())


def joules() -> float | None:
    """Returns the energy counter of the processor packages (Linux RAPL), or None without one.

    Only differences mean anything; the counter wraps after some hours.
    """
    total = 0.0
    domains = sorted(RAPL.glob("intel-rapl:[0-9]*")) if RAPL.is_dir() else []
    domains = [domain for domain in domains if domain.name.count(":") == 1]  # whole packages
    for domain in domains:
        try:
            total += int((domain / "energy_uj").read_text()) / 1e6
        except (OSError, ValueError):  # readable by root alone on most machines
            return None
    return total if domains else None
