"""What a run costs: seconds by kind, energy, and how much of the chip it uses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
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
    "TPU v5": 459e12,  # JAX's name of a v5p; its v5e is the "lite" one
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


def utilization(flops_per_second: float, devices: Collection[jax.Device]) -> float | None:
    """Returns the fraction of the peak of these devices, or None where it is not known.

    >>> utilization(1e9, jax.devices("cpu")) is None
    True
    """
    peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return flops_per_second / sum(known) if known and len(known) == len(peaks) else None


class Energy:
    """Joules used since it was made, by what used them: nothing where the machine does not tell.

    The machine's counters wrap; that is seen as long as it is read more often than they do (a
    processor package at full load takes some minutes at least).

    >>> set(Energy().joules()) <= {"joules"}
    True
    """

    def __init__(self) -> None:
        self._counters = _rapl_counters()
        self._last = [_read(counter) for counter, _ in self._counters]
        self._total = 0.0

    def joules(self) -> dict[str, float]:
        """Returns {"joules": of the processor packages (Linux RAPL)}, or {}."""
        if not self._counters:
            return {}
        for index, (counter, size) in enumerate(self._counters):
            now = _read(counter)
            self._total += (now - self._last[index]) % size / 1e6
            self._last[index] = now
        return {"joules": self._total}


def _rapl_counters() -> list[tuple[Path, int]]:
    """Returns (file of microjoules, value at which it wraps) by package; [] if one is closed."""
    packages = sorted(path for path in RAPL.glob("intel-rapl:*") if path.name.count(":") == 1)
    try:
        counters = [
            (package / "energy_uj", _read(package / "max_energy_range_uj") + 1)
            for package in packages
        ]
        for counter, _ in counters:
            _read(counter)
    except (OSError, ValueError):  # readable by root alone on most machines
        return []
    return counters


def _read(path: Path) -> int:
    return int(path.read_text())
