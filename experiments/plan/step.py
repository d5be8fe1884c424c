"""The real training step as shapes: what a run would execute, lowered without allocating anything.

The pieces are those of `experiments/runs/execute.py` (assemble, lay out, `make_train_step`,
donation and output layouts), but the arrays are shapes with a sharding, so that neither the devices
nor the memory need exist: the devices of the mesh may be a description of a machine elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.runs.assemble import Parts, abstract_frozen, abstract_state, assemble
from experiments.runs.layout import (
    Division,
    Layout,
    everywhere,
    lay_out,
    model_of,
    of_frozen,
    of_state,
    placed,
)
from model.attention import Attention, dot_product_attention
from parallel.placement import batch_shardings
from parallel.ring_attention import ring_attention
from train.plugs import State, whole
from train.settings import Settings
from train.step import make_train_step

PLAIN: Attention = functools.partial(dot_product_attention, platform="any", form="plain")
"""Holds all scores."""

ATTENTIONS: dict[str, Callable[[], Attention] | None] = {
    "mesh": None,
    "plain": lambda: PLAIN,
    # It keeps no scores and sends what plain attention does, which is what is compiled in its
    # place: cuDNN's kernel is for no CPU, and a compiler for TPUs has none.
    "fused": lambda: PLAIN,
    "ring": ring_attention,
}
"""Forms of attention by name: that of a run on the mesh and its chips, or one of three.

"mesh" is a ring over `context`, and without it what `model.attention.form_for` says of the target.
The form is the target's, whatever machine does the planning.
"""


class AbstractStep(NamedTuple):
    """A step that can be lowered.

    Attributes:
      step: jitted.
      arguments: (state, frozen, batch) as shapes that say where they lie.
      layout: of the mesh.
      parts: of the phase.
    """

    step: Any
    arguments: tuple[State, Any, dict[str, Any]]
    layout: Layout
    parts: Parts

    def lower(self) -> Any:
        """Returns the lowered step, under its mesh."""
        with jax.set_mesh(self.layout.mesh):
            return self.step.lower(*self.arguments)


def abstract_step(
    settings: Settings,
    mesh: Mesh,
    division: Division = Division(),  # noqa: B008 (an immutable tuple)
    attention: str = "mesh",
) -> AbstractStep:
    """Returns the step of the first phase of a run.

    Args:
      settings: of the run; nothing of its data is read.
      mesh: of real devices, or of `jax.experimental.topologies`.
      division: what the mesh leaves open.
      attention: a key of `ATTENTIONS`.

    Raises:
      ValueError: an unknown attention, or settings that the mesh does not divide.

    >>> from experiments.runs.layout import mesh_of
    >>> from model.presets import modern_tiny
    >>> from train.settings import Phase
    >>> settings = Settings(phases=(Phase(1, modern_tiny(), batch_size=2, sequence_length=16),))
    >>> abstract_step(settings, mesh_of("")).arguments[2]["tokens"].shape
    (2, 16)
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention {attention!r} is none of {', '.join(ATTENTIONS)}")
    phase = settings.phases[0]
    parts = assemble(settings, phase.model, mesh.shape["data"])
    layout = lay_out(mesh, division, settings, phase, parts)
    model = model_of(layout, parts.config)
    if (form := ATTENTIONS[attention]) is not None:
        model = model.clone(attention=form())
    step = make_train_step(
        model,
        parts.terms,
        parts.optimizer,
        transforms=parts.plugs.transforms,
        gradient=parts.plugs.gradient or whole,
        # As in a run: a method's gradient function goes through them by itself.
        micro_batches=settings.micro_batches if parts.plugs.gradient is None else 1,
        loss_chunk=settings.loss_chunk,
        max_nonfinite=settings.max_nonfinite,
    )
    if parts.plugs.around is not None:
        step = parts.plugs.around.step(step)
    with jax.set_mesh(mesh):
        state, frozen = abstract_state(settings, parts), abstract_frozen(settings, parts)
    shardings = of_state(layout, state)
    batch = abstract_batch(phase.batch_size, phase.sequence_length, mesh.shape["context"] > 1)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere(layout)))
    arguments = (
        placed(state, shardings),
        placed(frozen, of_frozen(layout, frozen)),
        placed(batch, batch_shardings(mesh, batch)),
    )
    return AbstractStep(jitted, arguments, layout, parts)


def abstract_batch(
    rows: int, time: int, positions: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of plain text.

    Args:
      rows: B.
      time: T.
      positions: whether tokens say where they stand, as those of a ring do.

    >>> sorted(abstract_batch(2, 8))
    ['targets', 'tokens', 'weights']
    """
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if positions:
        kinds["positions"] = jnp.int32
    return {name: jax.ShapeDtypeStruct((rows, time), kind) for name, kind in kinds.items()}
