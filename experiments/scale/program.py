"""The step of a run on a mesh, made of the parts that `experiments.runs.execute` makes it of.

What tables look at is a compiled program, or a few steps of it; neither needs a run's folder, its
data or its record.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.runs.assemble import Parts, abstract_state, assemble, first_state, initial_params
from experiments.runs.layout import (
    Division,
    Layout,
    everywhere,
    lay_out,
    mesh_of,
    model_of,
    of_state,
    place,
    placed,
)
from model.config import TransformerConfig
from model.presets import modern_tiny
from train.optimizers import AdamW
from train.plugs import PyTree, State, whole
from train.schedules import Constant
from train.settings import Phase, Settings
from train.step import make_train_step

VISIBLE = 0.05
"""Scale of what is added to each parameter, so that none is at rest at zero or one."""


class Program(NamedTuple):
    """A step on a mesh.

    Attributes:
      settings: of the run.
      parts: plugs, terms, optimizer.
      layout: mesh and strategies.
      step: `(state, frozen, batch) -> (state, metrics)`, jitted.
      shapes: of the state, with the place of each leaf.
    """

    settings: Settings
    parts: Parts
    layout: Layout
    step: Any
    shapes: State

    def compiled(self) -> Any:
        """Compiles the step for its shapes, without a state or a batch."""
        batch = place(self.layout, batch_of(self.settings, 0))
        with jax.set_mesh(self.layout.mesh):
            return self.step.lower(self.shapes, {}, batch).compile()


def settings_for(
    config: TransformerConfig,
    *,
    rows: int = 8,
    time: int = 32,
    steps: int = 10,
    optimizer: Any = None,
    **more: Any,
) -> Settings:
    """Returns settings of a short run of a model, on tokens that `batch_of` draws.

    Args:
      config: vocabulary included.
      rows: of a batch.
      time: tokens of a row.
      steps: that the schedule spans.
      optimizer: AdamW at 3e-3 by default.
      more: other fields of `Settings`.
    """
    optimizer = AdamW(learning_rate=3e-3) if optimizer is None else optimizer
    return Settings(
        (Phase(steps, config, rows, time),), optimizer=optimizer, schedule=Constant(), **more
    )


def small_model(dtype: str = "float32", **more: Any) -> TransformerConfig:
    """Returns the model of the tables of structure: each axis of 8 devices divides it."""
    shape = {"layers": 4, "width": 32, "heads": 4, "vocabulary_size": 64, "scan_layers": True}
    return modern_tiny(**{**shape, "dtype": dtype, "parameter_dtype": dtype, **more})


def program(settings: Settings, mesh: str, division: Division = Division()) -> Program:  # noqa: B008
    """Builds the step of the first phase of a run.

    Args:
      settings: of the run.
      mesh: as on a command line, "" for one device.
      division: strategies and the pipeline's passes.

    Raises:
      ValueError: as `experiments.runs.layout.lay_out`.
    """
    phase, on = settings.phases[0], mesh_of(mesh)
    with jax.set_mesh(on):
        parts = assemble(settings, phase.model, workers=on.shape["data"])
        layout = lay_out(on, division, settings, phase, parts)
        shapes = abstract_state(settings, parts)
        shardings = of_state(layout, shapes)
    plugs = parts.plugs
    step = make_train_step(
        model_of(layout, phase.model),
        parts.terms,
        parts.optimizer,
        transforms=plugs.transforms,
        gradient=plugs.gradient or whole,
        micro_batches=settings.micro_batches if plugs.gradient is None else 1,
        loss_chunk=settings.loss_chunk,
    )
    if plugs.around is not None:
        step = plugs.around.step(step)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere(layout)))
    return Program(settings, parts, layout, compiled, placed(shapes, shardings))


def first(built: Program) -> State:
    """Returns the state before the first step, on its devices, every parameter redrawn visibly."""
    settings, parts = built.settings, built.parts

    def make() -> State:
        params = initial_params(settings, parts.config)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(settings.seed + 1), len(leaves))
        drawn = [
            leaf + VISIBLE * jax.random.normal(key, leaf.shape, leaf.dtype)
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        return first_state(settings, parts, jax.tree.unflatten(structure, drawn), {})

    with jax.set_mesh(built.layout.mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, built.shapes)
        return jax.jit(make, out_shardings=shardings)()


def steps_of(built: Program, count: int) -> tuple[PyTree, list[float], PyTree]:
    """Runs some steps, each to its end before the next.

    Returns:
      The optimizer state after the first step, the losses, and the last parameters; on the host.
    """
    state, losses, after_one = first(built), list[float](), None
    with jax.set_mesh(built.layout.mesh):
        for number in range(count):
            batch = place(built.layout, batch_of(built.settings, number))
            state, metrics = built.step(state, {}, batch)
            losses.append(float(metrics["loss"]))
            if after_one is None:
                after_one = jax.device_get(state.optimizer)
    return after_one, losses, jax.device_get(state.params)


@functools.lru_cache(maxsize=32)
def batch_of(settings: Settings, number: int) -> dict[str, np.ndarray]:
    """Returns a batch of drawn tokens; one in eight positions has no loss, unevenly over rows."""
    phase = settings.phases[0]
    draw = np.random.default_rng([settings.seed, number])
    shape = (phase.batch_size, phase.sequence_length)
    # Half of the vocabulary: there is something to learn within ten steps.
    stream = draw.integers(0, max(2, phase.model.vocabulary_size // 2), (shape[0], shape[1] + 1))
    return {
        "tokens": stream[:, :-1].astype(np.int32),
        "targets": stream[:, 1:].astype(np.int32),
        "weights": (draw.random(shape) < draw.random((shape[0], 1)) * 0.25 + 0.75).astype(
            np.float32
        ),
    }
