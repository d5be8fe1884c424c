"""Meshes: the devices laid out along five named axes.

| axis       | what it divides                                   | speaks                          |
|------------|---------------------------------------------------|---------------------------------|
| `data`     | the rows of a batch                               | once a step                     |
| `pipeline` | the layers, in consecutive stages                 | between stages, point to point  |
| `fsdp`     | the rows of a batch, and parameters and optimizer | once a layer, whole parameters  |
| `context`  | the positions of a row                            | once a layer, keys and values   |
| `tensor`   | heads, feed-forward and vocabulary                | several times a layer, waiting  |

That is also the order of the axes, outermost first. Neighbours along the last axis are neighbours
among the devices, with the fastest links between them, so the axis that speaks most and can hide it
least is the innermost; those that speak least are left to the slow network between slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "pipeline", "fsdp", "context", "tensor")
"""Names of the axes, outermost first. Every mesh has all five; most are of size 1."""

BETWEEN_SLICES = ("data", "pipeline", "fsdp")
"""Axes that may cross the slow network between slices, in the order in which they are asked."""

BATCH_AXES = ("data", "fsdp")
"""Axes that divide the rows of a batch."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    pipeline: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Returns a mesh of all `devices`, every axis `Auto`: the compiler completes the layout.

    Args:
      data: size of the axis of that name; -1 for whatever the other axes leave.
      fsdp: likewise, as are the other three.
      tensor: see the table at the top of this file.
      context: see there.
      pipeline: see there.
      devices: those to use, all that JAX sees by default. Of several slices, each lies whole in the
        inner part of the mesh (`arrange`).

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or two of them are -1.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'pipeline': 1, 'fsdp': 1, 'context': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    asked = {
        "data": data,
        "pipeline": pipeline,
        "fsdp": fsdp,
        "context": context,
        "tensor": tensor,
    }
    sizes = axis_sizes(asked, len(devices))
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the arguments of `make_mesh` that a command line wrote, as in `data=2,tensor=4`.

    Axes that are left out are left to `make_mesh`, where `data` takes whatever is left; `data` is 1
    where another axis is -1. A run's mesh (`experiments.runs.layout.mesh_of`) has `data=1` wherever
    axes are named without it, and may leave devices idle, which it says.

    Raises:
      ValueError: an unknown axis, an axis given twice, or no whole number; the axes are listed.

    >>> parse_mesh("data=2,tensor=4")
    {'data': 2, 'tensor': 4}
    >>> parse_mesh("fsdp=-1")
    {'fsdp': -1, 'data': 1}
    >>> parse_mesh("tensors=4")
    Traceback (most recent call last):
    ...
    ValueError: the mesh 'tensors=4' names an axis 'tensors'; the axes are data, pipeline, fsdp, \
context, tensor
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (each.strip() for each in part.partition("="))
        if name not in AXES:
            raise ValueError(
                f"the mesh {text!r} names an axis {name!r}; the axes are {', '.join(AXES)}"
            )
        if name in sizes:
            raise ValueError(f"the mesh {text!r} gives {name!r} twice; give each axis once")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise ValueError(
                f"the mesh {text!r} gives {name!r} the size {size!r}; "
                "write it as in data=2,tensor=4, with -1 for whatever is left"
            ) from None
    if "data" not in sizes and -1 in sizes.values():
        sizes["data"] = 1
    return sizes


def axis_sizes(asked: dict[str, int], devices: int) -> dict[str, int]:
    """Returns the size of each axis, in the order of `AXES`, with -1 replaced.

    Args:
      asked: axis name -> size or -1; axes left out are 1.
      devices: their number.

    Raises:
      ValueError: as `make_mesh`.

    >>> axis_sizes({"data": -1, "tensor": 2}, 8)
    {'data': 4, 'pipeline': 1, 'fsdp': 1, 'context': 1, 'tensor': 2}
    """
    sizes = {name: asked.get(name, 1) for name in AXES}
    if wrong := [f"{name}={n}" for name, n in sizes.items() if n < 1 and n != -1]:
        raise ValueError(
            f"the mesh has {', '.join(wrong)}; a size is at least 1, or -1 for whatever is left"
        )
    open_axes = [name for name, n in sizes.items() if n == -1]
    if len(open_axes) > 1:
        raise ValueError(
            f"the mesh has -1 for {' and '.join(open_axes)}; only one axis can take whatever is "
            f"left of {devices} devices"
        )
    rest = math.prod(n for n in sizes.values() if n != -1)
    factors = " * ".join(f"{name}={n}" for name, n in sizes.items() if n not in (1, -1)) or "1"
    if open_axes:
        if devices % rest:
            raise ValueError(
                f"{factors} = {rest} does not divide {devices} devices, so there is no size for "
                f"{open_axes[0]}; {_fitting(devices)}"
            )
        sizes[open_axes[0]] = devices // rest
    elif rest != devices:
        raise ValueError(
            f"{factors} = {rest} is not the number of devices, {devices}; {_fitting(devices)}, or "
            "leave one axis at -1"
        )
    return sizes


def arrange(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices as an array of the shape of `sizes`, whose keys are `AXES` in order.

    Devices of several slices are those with different `slice_index`. The axes of `BETWEEN_SLICES`
    are then divided over the slices, the first of them as far as it goes, and the others lie inside
    one slice. Devices without a `slice_index` keep their order, in which the devices of one process
    stand together.

    Raises:
      ValueError: slices of different sizes, or axes that cannot be divided over the slices.

    >>> arrange(axis_sizes({"tensor": 2}, 2), ["a", "b"]).shape
    (1, 1, 1, 1, 2)
    """
    shape = tuple(sizes.values())
    slices: dict[int, int] = {}
    for device in devices:
        index = getattr(device, "slice_index", 0) or 0
        slices[index] = slices.get(index, 0) + 1
    if len(slices) == 1:
        if getattr(devices[0], "platform", None) != "tpu":
            return _object_array(devices).reshape(shape)
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if len(set(slices.values())) > 1:
        raise ValueError(f"slices of {sorted(slices.values())} devices; they must be of one size")
    outer, left = dict.fromkeys(sizes, 1), len(slices)
    for name in BETWEEN_SLICES:
        outer[name] = math.gcd(left, sizes[name])
        left //= outer[name]
    if left > 1:
        given = ", ".join(f"{name}={sizes[name]}" for name in BETWEEN_SLICES)
        raise ValueError(
            f"{len(slices)} slices cannot be divided over {given}, the axes that may cross the "
            f"slow network between slices; make data a multiple of {len(slices)}"
        )
    inner = tuple(sizes[name] // outer[name] for name in sizes)
    return mesh_utils.create_hybrid_device_mesh(
        inner, tuple(outer.values()), devices, allow_split_physical_axes=True
    )


def _object_array(devices: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(devices), dtype=object)
    array[:] = list(devices)
    return array


def _fitting(devices: int) -> str:
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return f"sizes that divide {devices} are {', '.join(map(str, divisors))}"
