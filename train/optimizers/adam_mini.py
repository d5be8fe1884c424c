"""Adam-mini: one second moment for each block of a parameter."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from model.rules import is_stacked, leaf_paths, match, path_of
from train.optimizers.matrix import map_to
from train.optimizers.settings import DecayingSettings, ScheduleOf
from train.optimizers.stages import stepped

BLOCKS = ("neuron", "whole")


@dataclasses.dataclass(frozen=True)
class AdamMini(DecayingSettings):
    """AdamW with one rate for each block of the Hessian (Zhang et al., arXiv 2406.16793).

    ::

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) mean_block(g * g)
        w <- w - rate * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w)

    Blocks are the paper's principle 1: heads of queries and keys, output neurons of other kernels,
    tokens of embedding and head, whole vectors. So the second moments all but vanish. Defaults of
    the authors' code, with the rate of `AdamW`, as the paper advises.

    Attributes:
      block_rules: ``(regex, block)`` pairs, first match wins, "whole" (of one layer) otherwise:
        "neuron" is a column of a kernel and a row of an embedding.
      head_width: columns of a head, the model's; then the heads of ``attention/q`` and
        ``attention/k`` are blocks. None leaves these to the rules, by default by neuron, which is
        finer than the paper.
    """

    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    block_rules: tuple[tuple[str, Literal["neuron", "whole"]], ...] = (
        ("kernel|embedding", "neuron"),
    )
    head_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [block for _, block in self.block_rules if block not in BLOCKS]:
            raise ValueError(f"block_rules know the blocks {', '.join(BLOCKS)}, not {wrong[0]!r}")
        if self.head_width is not None and self.head_width < 1:
            raise ValueError(f"head_width must be None or at least 1, not {self.head_width}")

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        rules: tuple[tuple[str, str], ...] = self.block_rules
        if self.head_width is not None:
            rules = (("attention/(q|k)/kernel", "head"), *rules)
        by_path = {}
        values = jax.tree.leaves(match(rules, params, default="whole"))
        for path, leaf, block in zip(
            leaf_paths(params), jax.tree.leaves(params), values, strict=True
        ):
            if block == "head" and leaf.shape[-1] % (self.head_width or 1):
                raise ValueError(
                    f"{path!r} of shape {leaf.shape} does not divide into heads of "
                    f"{self.head_width} columns; set head_width to the model's"
                )
            if block != "whole" and len(leaf.shape) - is_stacked(path) < 2:
                raise ValueError(
                    f"blocks by {block!r} are for matrices, and {path!r} of shape {leaf.shape} is "
                    'none; give it "whole" by block_rules'
                )
            by_path[path] = "token" if block == "neuron" and path.endswith("embedding") else block
        tx = _scale_by_adam_mini(self, by_path)
        return stepped(tx, self, schedule_of(self.learning_rate), params)


class AdamMiniState(NamedTuple):
    """Updates made, mean gradient, and mean squared gradient by block."""

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any


def _scale_by_adam_mini(settings: AdamMini, blocks: dict[str, str]) -> optax.GradientTransformation:
    b1, b2, width = settings.b1, settings.b2, settings.head_width or 1

    def mean(path: str, g: jax.Array) -> jax.Array:
        if blocks[path] == "whole":
            return g.mean(axis=tuple(range(is_stacked(path), g.ndim)), keepdims=True)
        if blocks[path] == "token":
            return g.mean(axis=-1, keepdims=True)
        by_column = g.mean(axis=-2, keepdims=True)
        if blocks[path] == "head":
            return by_column.reshape(*by_column.shape[:-1], -1, width).mean(axis=-1)
        return by_column

    def init(params):
        nu = jax.tree_util.tree_map_with_path(
            lambda key_path, p: mean(path_of(key_path), jnp.zeros(p.shape, jnp.float32)), params
        )
        return AdamMiniState(jnp.int32(0), optax.tree.zeros_like(params), nu)

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)

        def one(g, mu, nu, path):
            g32 = g.astype(jnp.float32)
            mu = b1 * mu.astype(jnp.float32) + (1 - b1) * g32
            nu = b2 * nu + (1 - b2) * mean(path, jnp.square(g32))
            second = jnp.repeat(nu, width, axis=-1) if blocks[path] == "head" else nu
            u = mu / (1 - b1**t) / (jnp.sqrt(second / (1 - b2**t)) + settings.eps)
            return u.astype(g.dtype), mu.astype(g.dtype), nu

        treedef: Any
        key_paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
        paths = treedef.unflatten([path_of(key_path) for key_path, _ in key_paths])
        updates, mu, nu = map_to(3, one, updates, state.mu, state.nu, paths)
        return updates, AdamMiniState(count, mu, nu)

    return optax.GradientTransformation(init, update)
