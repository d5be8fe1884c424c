"""Seconds of a training step by arithmetic, from what is published of a chip.

    matrices      = FLOPs that a device executes / its peak / the useful part of a pipeline
    update        = bytes that the optimizer reads and writes / bandwidth of the memory
    communication = sum over collectives of the bytes that a device sends / bandwidth of its links
    step          = matrices + update + communication   with nothing overlapped
                  = max(matrices + update, communication)   with everything overlapped
    utilisation   = FLOPs that the model needs / (devices * peak * step)

FLOPs are the analytic count of `model.flops`: a backward pass is two forward passes, `remat="full"`
one more. All stages of a pipeline compute the whole head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.plan.memory import Memory
from experiments.runs.layout import Division
from model.flops import flops_per_token
from parallel.chips import Chip, group_bandwidth
from parallel.pipeline import bubble
from parallel.traffic import RING, Collective
from parallel.traffic_formulas import Expected
from train.settings import Settings


class Time(NamedTuple):
    """Seconds of a step, and the FLOPs that the model needs for it.

    Attributes:
      matrices: products of matrices on one device, idle time of a pipeline included.
      update: of the optimizer.
      communication: of one device.
      needed: FLOPs of the model for the whole batch.
      available: FLOPs of all devices in a second.
    """

    matrices: float
    update: float
    communication: float
    needed: float
    available: float

    @property
    def compute(self) -> float:
        """Without communication."""
        return self.matrices + self.update

    @property
    def slowest(self) -> float:
        """With nothing overlapped."""
        return self.compute + self.communication

    @property
    def fastest(self) -> float:
        """With everything overlapped."""
        return max(self.compute, self.communication)

    @property
    def utilisation(self) -> tuple[float, float]:
        """Of the peak: with nothing and with everything overlapped."""
        low, high = (self.needed / (self.available * s) for s in (self.slowest, self.fastest))
        return low, high


def time_of(
    settings: Settings,
    sizes: Mapping[str, int],
    division: Division,
    chip: Chip,
    memory: Memory,
    communication: float,
) -> Time:
    """Returns the seconds of a step of the first phase.

    Args:
      settings: of the run.
      sizes: devices by axis, all axes.
      division: what the mesh leaves open.
      chip: whose peaks hold.
      memory: of `experiments.plan.memory.memory_of`.
      communication: seconds, from `seconds_of`.
    """
    phase = settings.phases[0]
    config, devices = phase.model, 1
    for size in sizes.values():
        devices *= size
    tokens = phase.batch_size * phase.sequence_length
    forward = flops_per_token(config, phase.sequence_length)
    head = 2.0 * config.width * config.vocabulary_size
    passes = 4 if config.remat == "full" else 3
    blocks = passes * (forward - head) * tokens / devices
    stages = sizes["pipeline"]
    if stages > 1:
        parts = division.pipeline_micro_batches or stages
        blocks /= 1 - bubble(stages, parts, division.pipeline_rounds)
    peak = chip.flops_float32 if config.dtype == "float32" else chip.flops
    # Parameters and state are read and written, gradients are written and read.
    moved = 2 * (memory.parameters + memory.optimizer + memory.gradients)
    return Time(
        (blocks + 3 * head * tokens * stages / devices) / peak,
        moved / chip.bandwidth,
        communication,
        3 * forward * tokens,
        devices * peak,
    )


def seconds_of(
    chip: Chip, sizes: Mapping[str, int], traffic: Sequence[Collective]
) -> dict[tuple[str, ...], float]:
    """Returns the seconds of communication by the axes that it runs over, as rings.

    >>> from parallel.chips import chip_named
    >>> sums = [Collective("all-reduce", 1, 8_000_000_000, ("data",), 8, True, "")]
    >>> round(seconds_of(chip_named("h100"), {"data": 8}, sums)["data",], 4)
    0.0311
    """
    found: dict[tuple[str, ...], float] = {}
    for each in traffic:
        if each.axes:
            seconds = each.sent / group_bandwidth(chip, sizes, each.axes)
            found[each.axes] = found.get(each.axes, 0.0) + seconds
    return found


def as_collectives(sizes: Mapping[str, int], formulas: Sequence[Expected]) -> list[Collective]:
    """Returns formulas in the form of what a program has.

    >>> rows = [Expected("all-gather", ("data",), 2, 64, "a kernel")]
    >>> as_collectives({"data": 4}, rows)[0].sent
    96.0
    """
    found = []
    for each in formulas:
        size = 1
        for name in each.axes:
            size *= sizes[name]
        assert each.kind in RING
        parts = (each.bytes,)
        found.append(
            Collective(each.kind, each.times, each.bytes, each.axes, size, True, each.why, parts)
        )
    return found
