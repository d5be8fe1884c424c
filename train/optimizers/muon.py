"""Muon: orthogonalised momentum for the kernels of the blocks."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from model.linear import at_least_float32
from train.optimizers.matrix import MatrixSettings
from train.optimizers.orthogonal import (
    FORMS,
    PRECONDITIONINGS,
    Coefficients,
    Form,
    Preconditioning,
    coefficients_named,
    orthogonalize,
)


@dataclasses.dataclass(frozen=True)
class Muon(MatrixSettings):
    """Orthogonalised momentum for the kernels of the blocks, AdamW for everything else.

    ::

        M <- momentum * M + (1 - momentum) * G
        W <- W - rate * (scale * orthogonalize(M) + weight_decay * W)

    Jordan et al., https://kellerjordan.github.io/posts/muon. The defaults are the tuned ones of Wen
    et al., arXiv 2509.02046, where clipping changed nothing.

    Attributes:
      learning_rate: Muon's rate. An update is this times a matrix whose singular values are near 1,
        times ``sqrt(max(1, out / in))``, or ``consistent_rms * sqrt(max(in, out))`` where set.
      momentum: of the gradient, before orthogonalising.
      nesterov: Nesterov's momentum for Muon; the AdamW part never has it.
      newton_schulz_steps: iterations of the orthogonalisation; the cost grows with them.
      newton_schulz_coefficients: see `train.optimizers.orthogonal.coefficients_named`.
      newton_schulz_form: see `train.optimizers.orthogonal.orthogonalize`; "auto" takes the one with
        fewer operations, and both give the same up to rounding.
      newton_schulz_dtype: type of its products; bfloat16 is faster where the hardware has it, and
        with "float32" those of float64 parameters are float64.
      preconditioning: scaling before the first iteration; all but "frobenius" orthogonalise better
        in as many steps, and "spectral" is much slower.
      consistent_rms: 0.2 gives the updates AdamW's root mean square, so that AdamW's rate and decay
        can be used as they are (Liu et al., arXiv 2502.16982). None for Jordan's scaling.
    """

    learning_rate: float = 0.016
    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    newton_schulz_coefficients: Literal["standard", "dion", "polar_express", "exact"] = "standard"
    newton_schulz_form: Form = "auto"
    newton_schulz_dtype: Literal["float32", "bfloat16"] = "float32"
    preconditioning: Preconditioning = "frobenius"
    consistent_rms: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        coefficients_named(self.newton_schulz_coefficients, self.newton_schulz_steps)
        for name, value, choices in (
            ("preconditioning", self.preconditioning, PRECONDITIONINGS),
            ("newton_schulz_form", self.newton_schulz_form, FORMS),
            ("newton_schulz_dtype", self.newton_schulz_dtype, ("float32", "bfloat16")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        if self.newton_schulz_form == "gram" and self.newton_schulz_dtype == "bfloat16":
            raise ValueError(
                "newton_schulz_form 'gram' needs newton_schulz_dtype 'float32'; for bfloat16 use "
                "'plain' or 'auto'"
            )

    def orthogonal(self) -> optax.GradientTransformation:
        """Momentum, orthogonalised, all singular values near 1."""
        return scale_by_orthogonal_momentum(
            coefficients_named(self.newton_schulz_coefficients, self.newton_schulz_steps),
            self.momentum,
            nesterov=self.nesterov,
            form=self.newton_schulz_form,
            dtype=self.newton_schulz_dtype,
            preconditioning=self.preconditioning,
        )

    def direction(self) -> optax.GradientTransformation:
        """See `MatrixSettings.direction`."""
        return optax.chain(self.orthogonal(), scale_by_shape(self.consistent_rms))


class MomentumState(NamedTuple):
    """Updates made, and the momentum."""

    count: jax.Array  # type: ignore[assignment]
    mu: Any


def scale_by_orthogonal_momentum(
    coefficients: Coefficients,
    momentum: float = 0.95,
    *,
    nesterov: bool = True,
    form: Form = "auto",
    dtype: str = "float32",
    preconditioning: Preconditioning = "frobenius",
) -> optax.GradientTransformation:
    """`optax.contrib.scale_by_muon` for stacked matrices: any form, product type and coefficients.

    Args:
      coefficients: see `train.optimizers.orthogonal`.
      momentum: what an update leaves of it.
      nesterov: Nesterov's momentum, with Optax's correction for the zero at the start.
      form, preconditioning: see `train.optimizers.orthogonal.orthogonalize`.
      dtype: of the orthogonalisation.

    >>> from train.optimizers.orthogonal import polar_express
    >>> tx = scale_by_orthogonal_momentum(polar_express(8))
    >>> grads = jnp.array([[[2.0, 0.0], [0.0, 0.1]]])
    >>> jnp.round(tx.update(grads, tx.init(grads))[0], 3).tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """

    def init(params):
        return MomentumState(jnp.int32(0), optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        mu = optax.tree.update_moment(updates, state.mu, momentum, 1)
        count = optax.safe_increment(state.count)
        if nesterov:
            ahead = optax.tree.bias_correction(mu, momentum, optax.safe_increment(count))
            now = optax.tree.bias_correction(updates, momentum, count)
            direction = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, now)
        else:
            direction = optax.tree.bias_correction(mu, momentum, count)

        def one(m, g):
            # "float32" is the least: float64 parameters keep their precision
            work = at_least_float32(m.dtype) if dtype == "float32" else dtype
            made = orthogonalize(m.astype(work), coefficients, form, preconditioning)
            return made.astype(g.dtype)

        return jax.tree.map(one, direction, updates), MomentumState(count, mu)

    return optax.GradientTransformation(init, update)


def scale_by_shape(consistent_rms: float | None = None) -> optax.GradientTransformation:
    """Scales orthogonal matrices [..., in, out] by what their shape asks for.

    ``sqrt(max(1, out / in))``, or ``consistent_rms * sqrt(max(in, out))``, which gives them that
    root mean square (Liu et al., arXiv 2502.16982).
    """

    def scaled(u: jax.Array) -> jax.Array:
        rows, columns = u.shape[-2:]
        if consistent_rms is None:
            return max(1.0, columns / rows) ** 0.5 * u
        return consistent_rms * max(rows, columns) ** 0.5 * u

    return optax.stateless(lambda updates, params: jax.tree.map(scaled, updates))
