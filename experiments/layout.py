"""Where a run lies: the mesh of its devices, and on it parameters, state, batches, activations.

A run on one device is a run on a mesh of one: there is no second way.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.assemble import Parts, abstract_whole
from model.block import Constrain, no_constraint
from parallel.mesh import axis_sizes, make_mesh, parse_mesh
from parallel.placement import (
    constrain,
    param_shardings,
    param_specs,
    place_batch,
    state_shardings,
)
from parallel.placement_checks import check_placement
from parallel.placement_strategies import Strategy, strategies_for
from parallel.report import memory_table, shares, temporary_bytes, whole_leaves
from train.plugs import PyTree, State
from train.settings import Phase, Settings


class Layout(NamedTuple):
    """The layout of one phase.

    Attributes:
      mesh: of the devices.
      strategies: what divides parameters and activations.
    """

    mesh: Mesh
    strategies: tuple[Strategy, ...]


def mesh_of(text: str) -> Mesh:
    """Returns the mesh that a command line wrote: one device for "", otherwise as many as it says.

    Raises:
      ValueError: the axes do not fit the devices.

    >>> mesh_of("").size
    1
    """
    devices = jax.devices()
    sizes = parse_mesh(text)
    if not sizes:
        return make_mesh(devices=devices[:1])
    # A mesh that names its size may leave devices idle; one with -1 takes all.
    asked = math.prod(sizes.values()) if -1 not in sizes.values() else len(devices)
    if asked > len(devices):
        axis_sizes({"data": 1, **sizes}, len(devices))  # raises, and says what would fit
    return make_mesh(**{"data": 1, **sizes}, devices=devices[:asked])


def lay_out(
    mesh: Mesh, more: tuple[str, ...], settings: Settings, phase: Phase, parts: Parts
) -> Layout:
    """Returns the layout of a phase, checked before anything is computed.

    Args:
      mesh: from `mesh_of`.
      more: names of strategies besides those of the mesh's axes: "zero1", "sequence".
      settings: of the run.
      phase: whose batch is divided.
      parts: of the phase.

    Raises:
      ValueError: heads, layers, batch or vocabulary that the mesh does not divide; an axis that
        divides nothing.
    """
    whole = abstract_whole(settings, parts.config)
    strategies = strategies_for(mesh, whole, more)
    if mesh.size > 1 or more:
        check_placement(
            mesh,
            parts.config,
            strategies,
            rows=phase.batch_size,
            time=phase.sequence_length,
            micro_batches=settings.micro_batches,
            vocabulary_multiple=settings.vocabulary_multiple,
        )
    return Layout(mesh, tuple(strategies))


def constrain_of(layout: Layout) -> Constrain:
    """Returns how activations are laid out."""
    if layout.mesh.size == 1:
        return no_constraint
    return constrain(layout.mesh, layout.strategies)


def of_state(layout: Layout, state: State) -> Any:
    """Returns the sharding of each leaf of a state, or of its shapes."""
    present = _present(layout, state.params)
    return state_shardings(layout.mesh, state, present)


def of_params(layout: Layout, params: PyTree) -> Any:
    """Returns the sharding of each parameter."""
    return param_shardings(layout.mesh, params, _present(layout, params))


def of_frozen(layout: Layout, frozen: PyTree) -> Any:
    """Returns the sharding of each leaf of what does not train: each tree by the strategies.

    A teacher may have shapes that the mesh does not divide (its vocabulary is not padded); such an
    axis lies whole on every device.
    """
    mesh = layout.mesh

    def fitting(leaf: Any, spec: P) -> NamedSharding:
        entries = []
        for length, names in zip(leaf.shape, tuple(spec) + (None,) * leaf.ndim, strict=False):
            axes = (names,) if isinstance(names, str) else tuple(names or ())
            parts = math.prod(mesh.shape[name] for name in axes)
            entries.append(names if length % parts == 0 else None)
        return NamedSharding(mesh, P(*entries))

    return {
        name: jax.tree.map(fitting, tree, param_specs(tree, _present(layout, tree)))
        for name, tree in frozen.items()
    }


def everywhere(layout: Layout) -> NamedSharding:
    """Returns the sharding of what every device holds a copy of."""
    return NamedSharding(layout.mesh, P())


def placed(shapes: PyTree, shardings: Any) -> PyTree:
    """Returns shapes that say where a checkpoint is to be restored to."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def place(layout: Layout, batch: dict[str, Any]) -> dict[str, jax.Array]:
    """Puts a batch onto the devices."""
    return place_batch(layout.mesh, batch)


def report(layout: Layout, state: State, compiled: Any | None) -> str:
    """Returns a table of what each device holds, and whether an axis really divides it."""
    shardings = of_state(layout, state)
    return memory_table(
        layout.mesh,
        shares(state, shardings),
        None if compiled is None else temporary_bytes(compiled),
        whole_leaves(state.params, shardings.params),
    )


def _present(layout: Layout, params: PyTree) -> list[Strategy]:
    """The strategies with the rules that match some of these parameters: others may be frozen."""
    names = [strategy.name for strategy in layout.strategies]
    return strategies_for(layout.mesh, params, names)
