"""What a mesh really divides: bytes per device of parameters, optimizer state and activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from model.rules import leaf_paths

PyTree = Any


class Share(NamedTuple):
    """A part of the state.

    Attributes:
      name: "parameters", "optimizer" or "other".
      whole: bytes of one copy.
      per_device: bytes that each device holds.
    """

    name: str
    whole: int
    per_device: int


def bytes_of(tree: PyTree) -> int:
    """Returns the bytes of one whole copy.

    Args:
      tree: arrays, or their shapes.

    >>> bytes_of({"kernel": jax.ShapeDtypeStruct((4, 8), "bfloat16")})
    64
    """
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_per_device(tree: PyTree, shardings: PyTree | None = None) -> int:
    """Returns the bytes that each device holds.

    Args:
      tree: arrays, or their shapes.
      shardings: of each leaf; None for those that the arrays themselves have.
    """
    if shardings is None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
    return sum(
        math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


def shares(state: Any, shardings: Any) -> list[Share]:
    """Returns the parts of a training state with what each device holds of them.

    Args:
      state: `train.plugs.State`, or its shapes.
      shardings: from `parallel.placement.state_shardings`.
    """
    parts = {
        "parameters": ["params"],
        "optimizer": ["optimizer"],
        "other": ["extra", "rng", "step"],
    }
    return [
        Share(
            name,
            bytes_of([getattr(state, field) for field in fields]),
            bytes_per_device(
                [getattr(state, field) for field in fields],
                [getattr(shardings, field) for field in fields],
            ),
        )
        for name, fields in parts.items()
    ]


def temporary_bytes(compiled: Any) -> int | None:
    """Returns the temporaries of a compiled step on each device, or None where XLA does not say.

    They are activations, gradients and buffers of collectives, as XLA has planned them for this
    backend; the parameters and state that go in and come out are not among them.

    >>> import jax.numpy as jnp
    >>> temporary_bytes(jax.jit(lambda x: x + 1).lower(jnp.ones(8)).compile())
    0
    """
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def whole_leaves(tree: PyTree, shardings: PyTree) -> list[tuple[str, int]]:
    """Returns path and bytes of what every device holds all of, the largest first.

    >>> from jax.sharding import NamedSharding, PartitionSpec
    >>> from parallel.mesh import make_mesh
    >>> whole = NamedSharding(make_mesh(devices=jax.devices()[:1]), PartitionSpec())
    >>> whole_leaves({"scale": jax.ShapeDtypeStruct((8,), "float32")}, {"scale": whole})
    [('scale', 32)]
    """
    rows = zip(leaf_paths(tree), jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    found = [(path, bytes_of(leaf)) for path, leaf, s in rows if s.is_fully_replicated]
    return sorted(found, key=lambda row: -row[1])


def memory_table(
    mesh: Mesh, parts: Sequence[Share], temporaries: int | None = None, whole: Sequence[Any] = ()
) -> str:
    """Returns the report of a run, as lines of text.

    Args:
      mesh: for the first line.
      parts: from `shares`.
      temporaries: from `temporary_bytes` of the compiled step; None if it is not known.
      whole: from `whole_leaves` of the parameters.

    >>> from parallel.mesh import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> print(memory_table(mesh, [Share("parameters", 4096, 512)], whole=[("head/bias", 8)]))
    mesh: 1 device
                           whole    per device   divided by
    parameters           4.0 KiB         512 B         8.00
    parameters whole on every device: 1, 0.20% of the bytes (head/bias)
    """
    devices = mesh.devices.size
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    lines = [
        f"mesh: {axes}{': ' if axes else ''}{devices} device{'s' if devices > 1 else ''}",
        f"{'':<14}{'whole':>14}{'per device':>14}{'divided by':>13}",
    ]
    for part in parts:
        ratio = f"{part.whole / part.per_device:.2f}" if part.per_device else "-"
        lines.append(
            f"{part.name:<14}{readable(part.whole):>14}{readable(part.per_device):>14}{ratio:>13}"
        )
    if temporaries is not None:
        text = f"{'temporaries':<14}{'':>14}{readable(temporaries):>14}"
        lines.append(f"{text}  (activations, gradients and buffers, from the compiler)")
    if whole:
        total = next((part.whole for part in parts if part.name == "parameters"), 0) or 1
        share = sum(number for _, number in whole) / total
        names = ", ".join(path for path, _ in whole[:3]) + (", ..." if len(whole) > 3 else "")
        lines.append(
            f"parameters whole on every device: {len(whole)}, {share:.2%} of the bytes ({names})"
        )
    return "\n".join(lines)


def readable(number: float) -> str:
    """Returns a count of bytes for people.

    >>> [readable(n) for n in (512, 4096, 3 * 2**30)]
    ['512 B', '4.0 KiB', '3.0 GiB']
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
