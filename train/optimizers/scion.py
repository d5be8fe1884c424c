"""Scion: steps of constant size in the norm that suits each parameter."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from model.rules import is_stacked, leaf_paths, match, path_of
from train.optimizers.cautious import cautious
from train.optimizers.orthogonal import coefficients_named, orthogonalize
from train.optimizers.settings import OptimizerSettings, ScheduleOf

NORMS = ("spectral", "sign", "rms")


@dataclasses.dataclass(frozen=True)
class Scion(OptimizerSettings):
    """The farthest point of a norm ball against the momentum (Pethick et al., arXiv 2502.07529).

    ::

        D <- momentum * D + (1 - momentum) * G
        W <- W - rate * radius * lmo(D),    or   (1 - rate) W - rate * radius * lmo(D)

    the second if constrained, which keeps W within the ball. By norm, for x W with W [in, out]::

        spectral   lmo(D) = sqrt(out / in) U V^T,  D = U S V^T
        sign       lmo(D) = sign(D) / in           (of an embedding [V, D]: / D, as if a head)
        rms        lmo(D) = D / rms(D)             of a vector

    Defaults are the paper's for NanoGPT, where hidden kernels have radius 50 and the shared
    embedding 3,000; Newton-Schulz as in `Muon`.

    Attributes:
      momentum: one minus the paper's alpha.
      constrained: whether weights shrink by the rate at each update.
      norm_rules: ``(regex, norm)`` pairs, first match wins, "rms" otherwise.
      spectral_radius, sign_radius, rms_radius: radius of each norm's ball.
    """

    learning_rate: float = 2**-12
    momentum: float = 0.9
    constrained: bool = False
    norm_rules: tuple[tuple[str, Literal["spectral", "sign", "rms"]], ...] = (
        ("blocks/.*/kernel", "spectral"),
        ("kernel|embedding", "sign"),
    )
    spectral_radius: float = 50.0
    sign_radius: float = 3000.0
    rms_radius: float = 50.0
    newton_schulz_steps: int = 5
    newton_schulz_coefficients: Literal["standard", "dion", "polar_express", "exact"] = "standard"

    def __post_init__(self) -> None:
        super().__post_init__()
        coefficients_named(self.newton_schulz_coefficients, self.newton_schulz_steps)
        if wrong := [norm for _, norm in self.norm_rules if norm not in NORMS]:
            raise ValueError(f"norm_rules know the norms {', '.join(NORMS)}, not {wrong[0]!r}")
        for name in ("spectral_radius", "sign_radius", "rms_radius"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")

    def transformation(self, schedule_of: ScheduleOf, params: Any) -> optax.GradientTransformation:
        """See `OptimizerSettings.transformation`."""
        norms = match(self.norm_rules, params, default="rms")
        for path, leaf, norm in zip(
            leaf_paths(params), jax.tree.leaves(params), jax.tree.leaves(norms), strict=True
        ):
            if norm != "rms" and len(leaf.shape) - is_stacked(path) < 2:
                raise ValueError(
                    f"the norm {norm!r} is for matrices, and {path!r} of shape {leaf.shape} is "
                    'none; give it "rms" by norm_rules'
                )
        coefficients = coefficients_named(self.newton_schulz_coefficients, self.newton_schulz_steps)

        def farthest(key_path, d, norm):
            path = path_of(key_path)
            d32 = d.astype(jnp.float32)
            if norm == "spectral":
                u = orthogonalize(d32, coefficients) * (d.shape[-1] / d.shape[-2]) ** 0.5
                u = self.spectral_radius * u
            elif norm == "sign":
                width = d.shape[-1] if path.endswith("embedding") else d.shape[-2]
                u = self.sign_radius / width * jnp.sign(d32)
            else:
                axes = tuple(range(1 if is_stacked(path) else 0, d.ndim))
                # By its largest element first: squares of a momentum that fades would underflow.
                d32 /= jnp.maximum(jnp.abs(d32).max(axis=axes, keepdims=True), 1e-30)
                rms = jnp.sqrt(jnp.square(d32).mean(axis=axes, keepdims=True))
                u = self.rms_radius * d32 / jnp.maximum(rms, 1e-30)
            return u.astype(d.dtype)

        def init(params):
            return ScionState(optax.tree.zeros_like(params))

        def update(updates, state, params=None):
            mu = optax.tree.update_moment(updates, state.mu, self.momentum, 1)
            return jax.tree_util.tree_map_with_path(farthest, mu, norms), ScionState(mu)

        direction = optax.GradientTransformation(init, update)
        if self.cautious:
            direction = cautious(direction)
        if self.constrained:  # caution is not of the pull towards the centre of the ball
            direction = optax.chain(direction, optax.add_decayed_weights(1.0))
        return optax.chain(direction, optax.scale_by_learning_rate(schedule_of(self.learning_rate)))


class ScionState(NamedTuple):
    """The momentum."""

    mu: Any
