"""Whether something else computes on this machine: figures of time would be of both."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

STAT = Path("/proc/stat")
TOLERATED = 0.2  # cores: what a quiet desktop does beside


def busy_cores(seconds: float = 0.5, stat: Path = STAT) -> float | None:
    """Returns how many cores work while this process waits; None where the system does not say.

    Args:
      seconds: of waiting.
      stat: the kernel's counters, see proc_stat(5).
    """
    if not stat.exists():
        return None
    before = _counted(stat)
    time.sleep(seconds)
    busy, every = (b - a for a, b in zip(before, _counted(stat), strict=True))
    return (os.cpu_count() or 1) * busy / every if every else None


def warn_if_busy() -> None:
    """Says on stderr that times which are measured now will be of something else as well."""
    found = busy_cores()
    if found is not None and found > TOLERATED:
        print(
            f"{found:.1f} of {os.cpu_count()} cores are busy with something else: what is timed "
            "now comes out slower and scatters more; stop the other work first.",
            file=sys.stderr,
        )


def _counted(stat: Path) -> tuple[int, int]:
    """Ticks of all cores since the start: those that worked, and all."""
    ticks = [int(text) for text in stat.read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - sum(ticks[3:5]), sum(ticks)  # the fourth and fifth are idle and waiting
