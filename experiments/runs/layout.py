"""Where a run lies: the mesh of its devices, and on it parameters, state, batches, activations.

A run on one device is a run on a mesh of one: there is no second way. An axis of the mesh brings
its own form of the model along: attention is a ring over `context`, the layers are a pipeline over
`pipeline`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.runs.assemble import Parts, abstract_whole
from model.attention import dot_product_attention
from model.block import no_constraint
from model.build import build_model
from model.config import TransformerConfig
from model.transformer import Transformer
from parallel.agreement import local_rows
from parallel.mesh import axis_sizes, make_mesh, parse_mesh
from parallel.pipeline import pipeline
from parallel.placement import (
    constrain,
    param_shardings,
    param_specs,
    place_batch,
    state_shardings,
)
from parallel.placement_checks import check_placement
from parallel.placement_strategies import Strategy, strategies_for
from parallel.reduce import Carry
from parallel.report import memory_table, shares, temporary_bytes, whole_leaves
from parallel.ring_attention import ring_attention
from parallel.ring_layout import check_time, zigzag
from train.plugs import PyTree, State
from train.settings import Phase, Settings


class Division(NamedTuple):
    """What of a layout a mesh leaves open; none of it changes what is learned.

    Attributes:
      strategies: names besides those of the mesh's axes: "zero1", "sequence".
      pipeline_micro_batches: parts in which rows pass the pipeline; as many as there are stages
        where it is None.
      pipeline_rounds: how often each part passes all stages, 1 for GPipe; with more, stages are
        shorter and idle less.
    """

    strategies: tuple[str, ...] = ()
    pipeline_micro_batches: int | None = None
    pipeline_rounds: int = 1


class Layout(NamedTuple):
    """The layout of one phase.

    Attributes:
      mesh: of the devices.
      strategies: what divides parameters and activations.
      pipeline: (micro-batches, rounds) of the pipeline, if there is one.
    """

    mesh: Mesh
    strategies: tuple[Strategy, ...]
    pipeline: tuple[int, int] | None = None


def mesh_of(text: str) -> Mesh:
    """Returns the mesh that a command line wrote: one device for "", otherwise as many as it says.

    An axis that is left out is 1. A mesh may leave devices idle, which `idle` puts into words.

    Raises:
      ValueError: the axes do not fit the devices.

    >>> mesh_of("").size
    1
    """
    devices = jax.devices()
    sizes = parse_mesh(text)
    if not sizes:  # several processes: all devices, since each process has to have some
        return make_mesh(devices=devices[: 1 if jax.process_count() == 1 else None])
    # A mesh that names its size may leave devices idle; one with -1 takes all.
    asked = math.prod(sizes.values()) if -1 not in sizes.values() else len(devices)
    if asked > len(devices):
        axis_sizes({"data": 1, **sizes}, len(devices))  # raises, and says what would fit
    if idle := {d.process_index for d in devices} - {d.process_index for d in devices[:asked]}:
        raise ValueError(
            f"a mesh of {asked} of the {len(devices)} devices leaves process "
            f"{', '.join(map(str, sorted(idle)))} of {jax.process_count()} none; give one axis -1, "
            "or start fewer processes"
        )
    return make_mesh(**{"data": 1, **sizes}, devices=devices[:asked])


def idle(mesh: Mesh) -> str:
    """Says how many of the machine's devices a mesh leaves without work; "" if none.

    >>> idle(make_mesh())
    ''
    """
    devices = jax.device_count(mesh.devices.flat[0].platform)
    if mesh.size == devices:
        return ""
    return (
        f"{devices - mesh.size} of {devices} devices are idle: the mesh has {mesh.size}; give an "
        "axis more, or -1 for whatever is left"
    )


def lay_out(
    mesh: Mesh, division: Division, settings: Settings, phase: Phase, parts: Parts
) -> Layout:
    """Returns the layout of a phase, checked before anything is computed.

    Args:
      mesh: from `mesh_of`.
      division: what the mesh leaves open.
      settings: of the run.
      phase: whose batch is divided.
      parts: of the phase.

    Raises:
      ValueError: heads, layers, batch, row length or vocabulary that the mesh does not divide; an
        axis that divides nothing; a model or a loss that its form cannot run.
    """
    whole = abstract_whole(settings, parts.config)
    strategies = strategies_for(mesh, whole, division.strategies)
    passes = _pipeline(mesh, division, phase)
    if mesh.size > 1 or division.strategies:
        check_placement(
            mesh,
            parts.config,
            strategies,
            rows=phase.batch_size,
            time=phase.sequence_length,
            micro_batches=settings.micro_batches * (passes[0] if passes else 1),
            vocabulary_multiple=settings.vocabulary_multiple,
        )
    if mesh.shape["context"] > 1:
        _check_ring(mesh, phase, parts)
    if passes is not None:
        _check_pipeline(mesh, passes, parts)
    if (workers := parts.plugs.workers) is not None and workers % mesh.shape["data"]:
        raise ValueError(
            f"{workers} workers do not divide over data={mesh.shape['data']}; make data one of "
            f"{', '.join(str(n) for n in range(1, workers + 1) if workers % n == 0)}"
        )
    if parts.plugs.around is not None and "zero1" in division.strategies:
        raise ValueError(
            "zero1 divides optimizer state over data, and here each worker has its own there; "
            "leave zero1 out"
        )
    if phase.batch_size % (rows := parts.plugs.rows):
        raise ValueError(
            f"a batch of {phase.batch_size} rows does not divide into {rows} parts, one for each "
            f"worker and micro-batch; make it a multiple of {rows}"
        )
    return Layout(mesh, tuple(strategies), passes)


def model_of(layout: Layout, config: TransformerConfig) -> Transformer:
    """Returns the model in the form that the mesh asks for; its parameters are the same in all."""
    one = layout.mesh.size == 1
    stack = None
    if layout.pipeline is not None:
        micro_batches, rounds = layout.pipeline
        stack = functools.partial(pipeline, micro_batches=micro_batches, rounds=rounds)
    return build_model(
        config,
        ring_attention() if layout.mesh.shape["context"] > 1 else dot_product_attention,
        no_constraint if one else constrain(layout.mesh, layout.strategies),
        stack,
    )


def of_state(layout: Layout, state: State) -> Any:
    """Returns the sharding of each leaf of a state, or of its shapes.

    What each worker of a method has for itself (`Carry.worker`) lies along `data`, and over the
    other axes with its parameter.
    """

    def along_data(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(layout.mesh, P("data", *sharding.spec[1:]))

    shardings = of_moved_state(layout, state)
    extra = {
        name: Carry(jax.tree.map(along_data, carry.worker), carry.shared)
        if isinstance(carry, Carry)
        else carry
        for name, carry in shardings.extra.items()
    }
    return replace(shardings, extra=extra)


def of_moved_state(layout: Layout, state: State) -> Any:
    """Returns the same for a state of any number of workers: their axis lies whole."""
    return state_shardings(layout.mesh, state, _present(layout, state.params))


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


def own_rows(layout: Layout, rows: int) -> slice | None:
    """Returns which rows of a batch this process has to read; None where they are no equal part."""
    own = local_rows(layout.mesh, rows)
    whole_part = len(own) == own[-1] - own[0] + 1 and not rows % len(own) and not own[0] % len(own)
    return slice(own[0], own[-1] + 1) if whole_part else None


def place(
    layout: Layout, batch: dict[str, Any], own: slice | None = None, rows: int | None = None
) -> dict[str, jax.Array]:
    """Puts a batch onto the devices, every row in the order that ring attention asks for.

    Args:
      layout: of the phase.
      batch: the global batch, or the rows `own` of it.
      own: from `own_rows`; None for all.
      rows: of the global batch, by default those that are given.
    """
    if (ring := layout.mesh.shape["context"]) > 1:
        shape = batch["tokens"].shape
        places = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        batch = zigzag({"positions": places, **batch}, ring)
    return place_batch(layout.mesh, batch, own.start if own else 0, rows)


def report(layout: Layout, state: State, compiled: Any | None) -> str:
    """Returns a table of what each device holds, whether an axis really divides it, who is idle."""
    shardings = of_state(layout, state)
    table = memory_table(
        layout.mesh,
        shares(state, shardings),
        None if compiled is None else temporary_bytes(compiled),
        whole_leaves(state.params, shardings.params),
    )
    return "\n".join(filter(None, [table, idle(layout.mesh)]))


def _present(layout: Layout, params: PyTree) -> list[Strategy]:
    """The strategies with the rules that match some of these parameters: others may be frozen."""
    names = [strategy.name for strategy in layout.strategies]
    return strategies_for(layout.mesh, params, names)


def _pipeline(mesh: Mesh, division: Division, phase: Phase) -> tuple[int, int] | None:
    """Micro-batches and rounds of the pipeline, None without one."""
    stages = mesh.shape["pipeline"]
    micro_batches, rounds = division.pipeline_micro_batches, division.pipeline_rounds
    if stages == 1:
        if micro_batches is not None or rounds != 1:
            raise ValueError(
                f"{micro_batches} micro-batches and {rounds} rounds of a pipeline have no effect "
                "on a mesh without one; give it the axis pipeline, or leave them out"
            )
        return None
    return stages if micro_batches is None else micro_batches, rounds


def _check_pipeline(mesh: Mesh, passes: tuple[int, int], parts: Parts) -> None:
    """Raises ValueError if the model or the loss cannot run as a pipeline."""
    stages, (micro_batches, rounds) = mesh.shape["pipeline"], passes
    config = parts.config
    if micro_batches < 1 or rounds < 1:
        raise ValueError(
            f"a pipeline has at least 1 micro-batch and 1 round, not {micro_batches} and {rounds}"
        )
    if config.layers % (stages * rounds):
        raise ValueError(
            f"{config.layers} layers do not divide into {rounds} rounds of pipeline={stages} "
            f"stages; make stages * rounds one of {_divisors(config.layers)}"
        )
    if rounds > 1 and micro_batches % stages:
        raise ValueError(
            f"{micro_batches} micro-batches do not fill groups of pipeline={stages}, as {rounds} "
            f"rounds need; make them a multiple of {stages}"
        )
    if config.random:
        raise ValueError(
            f"{_drops(config)} inside a pipeline would drop the same places of every "
            "micro-batch; train without, or without the axis pipeline"
        )
    if captured := sorted({name for term in parts.terms for name in term.capture}):
        raise ValueError(
            f"the loss looks at {' and '.join(captured)} of every block, and a pipeline passes on "
            "the stream alone; use an axis other than pipeline"
        )


def _check_ring(mesh: Mesh, phase: Phase, parts: Parts) -> None:
    """Raises ValueError if rows in zigzag order cannot be trained on."""
    check_time(phase.sequence_length, mesh.shape["context"])
    if parts.config.random:
        raise ValueError(
            "ring attention has no dropout on its probabilities and needs all tokens of a row in "
            f"every block, and the model has {_drops(parts.config)}; train without, or without the "
            "axis context"
        )
    for term in parts.terms:
        if term.prepare is not None or "attention" in term.capture:
            raise ValueError(
                f"the loss term {term.name!r} runs a model or compares attention maps on rows in "
                "their own order, and over context rows are cut out of order; use another axis"
            )


def _drops(config: TransformerConfig) -> str:
    rates = {name: getattr(config, name) for name in ("dropout", "layer_drop", "token_drop")}
    return ", ".join(f"{name}={rate}" for name, rate in rates.items() if rate)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
