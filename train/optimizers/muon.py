"""Muon: orthogonalised momentum for the kernels of the blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
      momentum_warmup_steps: updates over which the momentum rises in a straight line from
        `momentum_start`; 0 for none. A short memory while the gradient turns fast (modded-nanogpt,
        record 9: 300 steps from 0.85).
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
    momentum_start: float = 0.85
    momentum_warmup_steps: int = 0
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
        if self.momentum_warmup_steps < 0:
            raise ValueError(
                f"momentum_warmup_steps is {self.momentum_warmup_steps}; it must be at least 0"
            )
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
            warmup=(self.momentum_start, self.momentum_warmup_steps),
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
    warmup: tuple[float, int] = (0.0, 0),
) -> optax.GradientTransformation:
    """`optax.contrib.scale_by_muon` for stacked matrices: any form, product type and coefficients.

    Args:
      coefficients: see `train.optimizers.orthogonal`.
      momentum: what an update leaves of it.
      nesterov: Nesterov's momentum, with Optax's correction for the zero at the start.
      form, preconditioning: see `train.optimizers.orthogonal.orthogonalize`.
      dtype: of the orthogonalisation.
      warmup: what the momentum starts at, and in how many updates it rises to `momentum`.

    >>> from train.optimizers.orthogonal import polar_express
    >>> tx = scale_by_orthogonal_momentum(polar_express(8))
    >>> grads = jnp.array([[[2.0, 0.0], [0.0, 0.1]]])
    >>> jnp.round(tx.update(grads, tx.init(grads))[0], 3).tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """

    def init(params):
        return MomentumState(jnp.int32(0), optax.tree.zeros_like(params))

    rising, left = _warming(momentum, *warmup)

    def update(updates, state, params=None):
        # b: this update's momentum; of the zero at the start, `left` updates later, is still there.
        b = rising(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b, 1)
        # A momentum that rises is a float32 array, and would make one of a bfloat16 memory.
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        count = optax.safe_increment(state.count)
        if nesterov:
            ahead = _corrected(mu, left(optax.safe_increment(count)))
            now = _corrected(updates, left(count))
            direction = jax.tree.map(lambda m, g: b * m + (1 - b) * g, ahead, now)
        else:
            direction = _corrected(mu, left(count))

        def one(m, g):
            # "float32" is the least: float64 parameters keep their precision
            work = at_least_float32(m.dtype) if dtype == "float32" else dtype
            made = orthogonalize(m.astype(work), coefficients, form, preconditioning)
            return made.astype(g.dtype)

        return jax.tree.map(one, direction, updates), MomentumState(count, mu)

    return optax.GradientTransformation(init, update)


def _warming(
    momentum: float, start: float, steps: int
) -> tuple[Callable[[jax.Array], Any], Callable[[jax.Array], jax.Array]]:
    """The momentum of update number n, counted from 0, and the product of those of the first n.

    The product is what n updates leave of the value at the start.
    """
    if not steps:
        return lambda n: momentum, lambda n: momentum**n
    rising = start + (momentum - start) * np.arange(steps) / steps
    products = np.float32(np.cumprod([1.0, *rising]))

    def at(n: jax.Array) -> jax.Array:
        return jnp.where(n < steps, jnp.float32(rising)[jnp.minimum(n, steps - 1)], momentum)

    def product(n: jax.Array) -> jax.Array:
        return jnp.asarray(products)[jnp.minimum(n, steps)] * momentum ** jnp.maximum(n - steps, 0)

    return at, product


def _corrected(tree: Any, left: jax.Array) -> Any:
    """What Optax's bias correction does: the mean of what was seen, without the zero before."""
    return jax.tree.map(lambda m: m / (1 - left).astype(m.dtype), tree)


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
