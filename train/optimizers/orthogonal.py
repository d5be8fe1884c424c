"""The orthogonal factor of matrices by products alone: Newton-Schulz, plain or on the Gram matrix.

All forms compute ``p_s(... p_1(X))`` for odd polynomials ``p(x) = a x + b x^3 + c x^5`` that act on
the singular values and drive them to 1: from ``X = U S V^T`` to about ``U V^T``.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from model.lapack import one_by_one

Coefficients = tuple[tuple[float, float, float], ...]
Form = Literal["auto", "plain", "gram"]
Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]

_JORDAN = (3.4445, -4.7750, 2.0315)
_DION = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Most steps that the coefficients are good for: more than 20 rounds of Jordan's, which circle
# around 1 for ever, only cost time, and 20 of the others make any float32 matrix orthogonal.
COEFFICIENTS = {"standard": 20, "dion": len(_DION), "polar_express": 20, "exact": 20}
FORMS = ("auto", "plain", "gram")
PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")
_RESTART = 5  # steps on one Gram matrix: in float32 it knows singular values down to 3e-4 only
_TINY = 1e-8


def coefficients_named(name: str, steps: int) -> Coefficients:
    """Coefficients ``(a, b, c)`` of each of the steps.

    Args:
      name: "standard", Jordan's three in every step, which leave singular values between 0.7 and
        1.2 (https://kellerjordan.github.io/posts/muon); "dion", five that change by step (Ahn et
        al., arXiv 2504.05295); "polar_express", see `polar_express`; "exact", ``(2, -1.5, 0.5)``,
        slow at small singular values, but exact in the end.
      steps: how many; of "dion" the last ones are taken, as in Optax.

    Raises:
      ValueError: no such name, or more steps than it has.

    >>> coefficients_named("standard", 2)
    ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    if name not in COEFFICIENTS:
        raise ValueError(
            f"newton_schulz_coefficients must be one of {', '.join(COEFFICIENTS)}, not {name!r}"
        )
    if not 1 <= steps <= COEFFICIENTS[name]:
        raise ValueError(
            f"newton_schulz_steps must lie between 1 and {COEFFICIENTS[name]} with the "
            f"coefficients {name!r}, not {steps}"
        )
    if name == "polar_express":
        return polar_express(steps)
    if name == "dion":
        return _DION[-steps:]
    return ((_JORDAN if name == "standard" else (2.0, -1.5, 0.5)),) * steps


def polar_express(
    steps: int, lowest: float = 1e-3, safety: float = 0.01, cushion: float = 0.02407327424182761
) -> Coefficients:
    """The coefficients that bring ``[lowest, 1]`` closest to 1 in so many steps.

    Step by step the odd quintic with the smallest ``max |1 - p(x)|`` over the interval that the one
    before left, by Remez exchange at four points; greedy is optimal here. Amsel et al.,
    arXiv 2505.16932, algorithm 1 and section 3.3.

    Args:
      steps: how many.
      lowest: smallest singular value, relative to the norm, that the steps are made for.
      safety: all but the last step first divide by ``1 + safety``, against rounding errors that
        leave singular values above 1.
      cushion: the interval's lower end is at least so much of its upper end; without it small
        singular values grow fast but the others waver.

    >>> [round(c, 4) for c in polar_express(1)[0]]
    [8.2872, -23.5959, 17.3004]
    """
    low, high = lowest, 1.0
    found = []
    for _ in range(steps):
        a, b, c = _closest_quintic(max(low, cushion * high), high)
        # centred on the true interval where the cushion widened it
        centre = 2.0 / sum(a * x + b * x**3 + c * x**5 for x in (low, high))
        a, b, c = a * centre, b * centre, c * centre
        found.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2.0 - low
    shrinks = [1.0 + safety] * (steps - 1) + [1.0]
    return tuple(
        (float(a / by), float(b / by**3), float(c / by**5))
        for (a, b, c), by in zip(found, shrinks, strict=True)
    )


def _closest_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The odd quintic nearest to 1 on [low, high] in the largest error."""
    if low / high > 1.0 - 5e-6:  # the limit, which Remez no longer resolves
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    error = np.inf
    while True:
        x = np.array([low, *inner, high])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        a, b, c, new = np.linalg.solve(np.stack([x, x**3, x**5, signs], axis=1), np.ones(4))
        # the two inner extrema of the polynomial
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
        if abs(new - error) <= 1e-15:
            return float(a), float(b), float(c)
        error = new


def orthogonalize(
    x: jax.Array,
    coefficients: Coefficients,
    form: Form = "auto",
    preconditioning: Preconditioning = "frobenius",
) -> jax.Array:
    """Brings the singular values of matrices near 1 and leaves their singular vectors.

    With ``X`` of m rows, at most as many as its n columns (else transposed), each step is::

        plain:  A = X X^T,   X <- a X + (b A + c A^2) X                         4 m^2 n + 2 m^3
        gram:   Z = b R + c R^2,   Q <- a Q + Z Q,   R <- (a + Z) R (a + Z)     8 m^3

    where ``R = X X^T`` and ``Q = 1`` at the start and ``X <- Q X`` at the end (2 m^2 n each): all
    steps but these happen on the small side, as polynomials of one matrix commute. "gram" starts
    anew from its X every five steps, since R holds squares.

    Args:
      x: [..., rows, columns]; every matrix by itself. Zero matrices stay zero.
      coefficients: of each step, see `coefficients_named`.
      form: "plain", "gram", or "auto" for the one with fewer operations: with five steps, gram
        from 1.5 times as many columns as rows on. In bfloat16 "auto" is plain.
      preconditioning: what the first step divides by: the Frobenius norm, the largest singular
        value (slow), the roots of the rows' sums of ``|A|`` (Boissin et al., arXiv 2512.04632), or
        the Schatten-4 norm (Grishina et al., arXiv 2506.10935).

    Raises:
      ValueError: no such form or preconditioning; "gram" in bfloat16, which its squares overwhelm.

    >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    >>> jnp.round(orthogonalize(x, polar_express(8)), 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if form not in FORMS:
        raise ValueError(f"the form must be one of {', '.join(FORMS)}, not {form!r}")
    if form == "gram" and jnp.finfo(x.dtype).bits < 32:
        raise ValueError(f"the gram form needs float32 or more, not {x.dtype}; use plain or auto")
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    if form == "auto":
        cheaper = _gram_is_cheaper(x.shape[-2], x.shape[-1], len(coefficients))
        form = "gram" if cheaper and jnp.finfo(x.dtype).bits >= 32 else "plain"
    x = _preconditioned(x, preconditioning)
    x = _on_gram_matrix(x, coefficients) if form == "gram" else _plain(x, coefficients)
    return x.mT if tall else x


def _gram_is_cheaper(rows: int, columns: int, steps: int) -> bool:
    """Compares products, in units of 2 rows^3."""
    long = columns / rows
    rounds = -(-steps // _RESTART)
    # the first Q and the last R of a round cost nothing
    return 2 * long * rounds + 4 * steps - 3 * rounds < steps * (2 * long + 1)


def _plain(x: jax.Array, coefficients: Coefficients) -> jax.Array:
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _on_gram_matrix(x: jax.Array, coefficients: Coefficients) -> jax.Array:
    for first in range(0, len(coefficients), _RESTART):
        gram = x @ x.mT
        product: Any = None  # the identity, times which nothing has to be computed
        part = coefficients[first : first + _RESTART]
        for number, (a, b, c) in enumerate(part, 1):
            z = b * gram + c * (gram @ gram)
            if product is None:
                product = a * jnp.eye(x.shape[-2], dtype=x.dtype)[(None,) * (x.ndim - 2)] + z
            else:
                product = a * product + z @ product
            if number < len(part):
                half = a * gram + z @ gram
                gram = a * half + half @ z
        x = product @ x
    return x


def _preconditioned(x: jax.Array, kind: Preconditioning) -> jax.Array:
    if kind == "frobenius":
        size = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    elif kind == "spectral":
        size = one_by_one(lambda one: jnp.linalg.norm(one, ord=2, keepdims=True), x)
    elif kind == "aol":
        size = jnp.sqrt(jnp.abs(x @ x.mT).sum(axis=-1, keepdims=True))
    elif kind == "schatten":
        size = jnp.sqrt(jnp.linalg.norm(x @ x.mT, axis=(-2, -1), keepdims=True))
    else:
        raise ValueError(
            f"preconditioning must be one of {', '.join(PRECONDITIONINGS)}, not {kind!r}"
        )
    return x / jnp.maximum(size, jnp.asarray(_TINY, x.dtype))
