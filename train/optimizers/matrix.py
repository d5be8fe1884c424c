"""Optimizers of matrices: which parameters are theirs, and AdamW beside them for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from model.rules import is_stacked, leaf_paths, match
from train.optimizers.settings import BoolRules, DecayingSettings, ScheduleOf
from train.optimizers.stages import stepped
from train.optimizers.wide import wide


@dataclasses.dataclass(frozen=True)
class MatrixSettings(DecayingSettings):
    """What the optimizers of matrices share: AdamW at a rate of its own for all that is not theirs.

    The last two axes of a parameter are its matrix, and what stands before them (layers, experts)
    counts matrices: each is seen by itself.

    Attributes:
      matrix_rules: ``(regex, whether it is theirs)`` pairs, first match wins, AdamW otherwise. By
        default the kernels of the blocks; Optax's default for Muon would take embeddings and head
        and leave out the stacked kernels.
      adam_learning_rate: peak of the AdamW part's rate.
      adam_weight_decay: decay of the AdamW part, under the same ``decay_rules``.
    """

    weight_decay: float = 0.1
    matrix_rules: BoolRules = (("blocks/.*/kernel", True),)
    adam_learning_rate: float = 3.2e-3
    adam_b1: float = 0.8
    adam_b2: float = 0.98
    adam_eps: float = 1e-8
    adam_weight_decay: float = 0.1

    def direction(self) -> optax.GradientTransformation:
        """What the learning rate multiplies and the step of a matrix subtracts."""
        raise NotImplementedError

    def matrix_part(self, schedule: optax.Schedule, params: Any) -> optax.GradientTransformation:
        """The whole step of a matrix."""
        return stepped(self.direction(), self, schedule, params)

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        chosen = match(self.matrix_rules, params, default=False)
        for path, leaf, theirs in zip(
            leaf_paths(params), jax.tree.leaves(params), jax.tree.leaves(chosen), strict=True
        ):
            if theirs and len(leaf.shape) - is_stacked(path) < 2:
                raise ValueError(
                    f"{type(self).__name__} is for matrices, and {path!r} of shape {leaf.shape} is "
                    "none; write matrix_rules that leave it to AdamW"
                )
        return optax.partition(
            {
                "matrix": self.matrix_part(schedule_of(self.learning_rate), params),
                "adam": stepped(
                    wide(optax.scale_by_adam(self.adam_b1, self.adam_b2, self.adam_eps)),
                    self,
                    schedule_of(self.adam_learning_rate),
                    params,
                    self.adam_weight_decay,
                ),
            },
            jax.tree.map(lambda theirs: "matrix" if theirs else "adam", chosen),
            mask_compatible_extra_args=True,
        )


def frobenius(x: jax.Array) -> jax.Array:
    """The Frobenius norm of each matrix [..., m, n], as [..., 1, 1]."""
    return jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)


def map_to(number: int, fn: Callable[..., Any], tree: Any, *rest: Any) -> tuple[Any, ...]:
    """Like `jax.tree.map` for a function that returns several values: one tree for each.

    >>> map_to(2, lambda a, b: (a + b, a - b), {"w": 3}, {"w": 1})
    ({'w': 4}, {'w': 2})
    """
    leaves: list[Any]
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree)
    values = [fn(*args) for args in zip(leaves, *map(treedef.flatten_up_to, rest), strict=True)]
    return tuple(treedef.unflatten([value[i] for value in values]) for i in range(number))
