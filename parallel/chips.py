"""Chips: what their makers publish of them, and how long a collective takes on their links.

Peaks are dense (without structured sparsity), memory is what a program can have of it, bandwidths
are of one direction. Nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

GB = 1e9
GiB = 2**30


class Chip(NamedTuple):
    """One accelerator.

    Attributes:
      name: as a command line writes it.
      platform: "gpu" or "tpu".
      flops: matrix products, bfloat16 with float32 sums, per second.
      flops_float32: the same for float32 operands: TF32 on GPUs; on TPUs products of float32
        arrays run in bfloat16 unless more is asked for.
      memory: bytes of HBM.
      bandwidth: of the HBM, bytes per second.
      link: bytes per second that one link sends: to any chip of the domain through a switch (GPUs),
        or to the next one along one axis of a torus (TPUs).
      links: of a chip; 1 where it is a switch.
      domain: chips that these links join; a pod of TPUs.
      network: bytes per second that a chip sends beyond its domain.
      topology: of a TPU, how `jax.experimental.topologies` calls it, else "".
      dimensions: of the torus; 0 for a switch.
      source: where the figures are published.
    """

    name: str
    platform: Literal["gpu", "tpu"]
    flops: float
    flops_float32: float
    memory: float
    bandwidth: float
    link: float
    links: int
    domain: int
    network: float
    topology: str
    dimensions: int
    source: str


_NVIDIA = "NVIDIA data sheet and DGX user guide: "
_UNREAD = "not checked against a data sheet: "
_GOOGLE = "cloud.google.com/tpu/docs/"

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # NVLink is published as the sum of both directions: 600, 900, 1,800 GB/s. A DGX A100 has
        # eight adapters of 200 Gb/s, a DGX H100, H200 or B200 eight of 400 Gb/s: one for each GPU.
        Chip("a100", "gpu", 312e12, 156e12, 80e9, 2039 * GB, 300 * GB, 1, 8, 25 * GB, "", 0,
             _UNREAD + "A100 80GB SXM"),
        Chip("h100", "gpu", 989e12, 494e12, 80e9, 3350 * GB, 450 * GB, 1, 8, 50 * GB, "", 0,
             _NVIDIA + "H100 SXM"),
        Chip("h200", "gpu", 989e12, 494e12, 141e9, 4800 * GB, 450 * GB, 1, 8, 50 * GB, "", 0,
             _NVIDIA + "H200 SXM"),
        Chip("b200", "gpu", 2250e12, 1125e12, 180e9, 8000 * GB, 900 * GB, 1, 8, 50 * GB, "", 0,
             _UNREAD + "DGX B200"),
        # Interconnect is published per chip, all links and both directions: 400, 1,200, 800 GB/s,
        # over 4, 6 and 4 links.
        Chip("v5e", "tpu", 197e12, 197e12, 16 * GiB, 819 * GB, 50 * GB, 4, 256, 3.1 * GB, "v5e", 2,
             _GOOGLE + "v5e"),
        Chip("v5p", "tpu", 459e12, 459e12, 95 * GiB, 2765 * GB, 100 * GB, 6, 8960, 6.2 * GB, "v5p",
             3, _GOOGLE + "v5p"),
        Chip("v6e", "tpu", 918e12, 918e12, 32 * GiB, 1638 * GB, 100 * GB, 4, 256, 12.5 * GB, "v6e",
             2, _GOOGLE + "v6e"),
    )
}  # fmt: skip
"""By name."""


def chip_named(name: str) -> Chip:
    """Returns a chip.

    Raises:
      ValueError: there is none of that name; they are listed.

    >>> chip_named("h100").memory
    80000000000.0
    >>> chip_named("h9")
    Traceback (most recent call last):
    ...
    ValueError: no chip is called 'h9'; there are a100, h100, h200, b200, v5e, v5p, v6e
    """
    if name not in CHIPS:
        raise ValueError(f"no chip is called {name!r}; there are {', '.join(CHIPS)}")
    return CHIPS[name]


def group_bandwidth(chip: Chip, sizes: Mapping[str, int], axes: Sequence[str]) -> float:
    """Returns the bytes per second that each chip sends in a ring over some axes of a mesh.

    Chips are numbered along the mesh, the last axis fastest. GPUs of one node send through its
    switch; where a group reaches beyond, its members in one node share their adapters, and the
    slower of the two counts. On a TPU a ring runs both ways over one axis of the torus, or over as
    many as the group's axes have.

    Args:
      chip: from `CHIPS`.
      sizes: devices by axis, outermost first.
      axes: along which the members of a group differ.

    >>> sizes = {"data": 4, "tensor": 8}
    >>> group_bandwidth(CHIPS["h100"], sizes, ["tensor"]) / GB
    450.0
    >>> group_bandwidth(CHIPS["h100"], sizes, ["data"]) / GB
    50.0
    """
    if chip.platform == "tpu":
        spread = min(chip.dimensions, max(1, sum(sizes[name] > 1 for name in axes)))
        return 2 * chip.link * spread
    stride, inside, outside = 1, 1, 1
    for name in reversed(list(sizes)):
        if name in axes:
            # Members of this axis that fit into what the inner axes leave of a node.
            here = max(1, min(sizes[name], chip.domain // stride)) if stride < chip.domain else 1
            inside *= here
            outside *= -(-sizes[name] // here)
        stride *= sizes[name]
    return chip.link if outside == 1 else min(chip.link, inside * chip.network)


def chips_table() -> str:
    """Returns the table of chips, with the source of each."""
    lines = [
        f"{'chip':<6}{'TFLOP/s':>9}{'HBM':>9}{'HBM GB/s':>10}{'link GB/s':>11}{'links':>7}"
        f"{'beyond':>8}  source"
    ]
    for c in CHIPS.values():
        lines.append(
            f"{c.name:<6}{c.flops / 1e12:>9.0f}{c.memory / GB:>6.0f} GB{c.bandwidth / GB:>10.0f}"
            f"{c.link / GB:>11.0f}{c.links:>7}{c.network / GB:>8.1f}  {c.source}"
        )
    return "\n".join(lines)
