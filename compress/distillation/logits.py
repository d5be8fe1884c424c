"""Distillation on logits: how far the student's next-token distribution is from the teacher's.

    P = softmax(teacher / T)    Q = softmax(student / T)

Every divergence is a sum over positions, `T^2 * sum_n w_n * D(P_n, Q_n)`; divided by the sum of the
weights it is a mean. T^2 keeps the size of the gradient as T grows (Hinton et al. 2015,
arXiv:1503.02531). The functions see a chunk of positions and hold nothing larger.

Shapes: N positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.linear import at_least_float32

Divergence = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


def forward_kl(
    student_NV: jax.Array, teacher_NV: jax.Array, weights_N: jax.Array, temperature: Any = 1.0
) -> jax.Array:
    """`T^2 * sum_n w_n KL(P_n || Q_n)`: the student covers all that the teacher holds likely.

    Args:
      student_NV: logits.
      teacher_NV: logits over the same vocabulary; stop the gradient outside.
      weights_N: 0 where nothing counts, whatever the logits hold there.
      temperature: T > 0, a number or a scalar.

    Raises:
      ValueError: shapes that differ, or a temperature that is not positive.

    >>> student, teacher = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.9, 0.1]]))
    >>> round(float(forward_kl(student, teacher, jnp.ones(1))), 4)  # log 2 - H(0.9, 0.1)
    0.3681
    """
    p_NV, q_NV, T = _log_distributions(student_NV, teacher_NV, weights_N, temperature)
    return T**2 * _weighted(_kl(p_NV, q_NV), weights_N)


def reverse_kl(
    student_NV: jax.Array, teacher_NV: jax.Array, weights_N: jax.Array, temperature: Any = 1.0
) -> jax.Array:
    """`T^2 * sum_n w_n KL(Q_n || P_n)`: the student keeps to what the teacher holds likely.

    The divergence of MiniLLM (Gu et al. 2023, arXiv:2306.08543).

    Args:
      student_NV: as in `forward_kl`.
      teacher_NV: as in `forward_kl`.
      weights_N: as in `forward_kl`.
      temperature: as in `forward_kl`.

    Raises:
      ValueError: as `forward_kl`.

    >>> student, teacher = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.9, 0.1]]))
    >>> round(float(reverse_kl(student, teacher, jnp.ones(1))), 4)
    0.5108
    """
    p_NV, q_NV, T = _log_distributions(student_NV, teacher_NV, weights_N, temperature)
    return T**2 * _weighted(_kl(q_NV, p_NV), weights_N)


def jensen_shannon(beta: float = 0.5) -> Divergence:
    """Returns the generalised Jensen-Shannon divergence, between the two Kullback-Leibler ones.

    `beta KL(P || M) + (1 - beta) KL(Q || M)` with `M = beta P + (1 - beta) Q`. As beta goes to 0,
    it tends to `beta KL(P || Q)`; as beta goes to 1, to `(1 - beta) KL(Q || P)`
    (GKD, Agarwal et al. 2023, arXiv:2306.13649).

    Args:
      beta: above 0 and below 1.

    Raises:
      ValueError: a beta outside; the ends are `forward_kl` and `reverse_kl`.

    >>> student, teacher = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.9, 0.1]]))
    >>> round(float(jensen_shannon()(student, teacher, jnp.ones(1), 1.0)), 4)
    0.1017
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta is {beta}; it must be above 0 and below 1 (the ends are the forward and the "
            "reverse divergence)"
        )

    def divergence(
        student_NV: jax.Array, teacher_NV: jax.Array, weights_N: jax.Array, temperature: Any = 1.0
    ) -> jax.Array:
        p_NV, q_NV, T = _log_distributions(student_NV, teacher_NV, weights_N, temperature)
        log_beta = jnp.log(jnp.asarray(beta, p_NV.dtype))
        log_rest = jnp.log(jnp.asarray(1 - beta, p_NV.dtype))
        m_NV = jnp.logaddexp(log_beta + p_NV, log_rest + q_NV)
        loss_N = beta * _kl(p_NV, m_NV) + (1 - beta) * _kl(q_NV, m_NV)
        return T**2 * _weighted(loss_N, weights_N)

    return divergence


DIVERGENCES: dict[str, Callable[[float], Divergence]] = {
    "forward": lambda beta: forward_kl,
    "reverse": lambda beta: reverse_kl,
    "jensen_shannon": jensen_shannon,
}
"""Name -> what makes the divergence from beta, which only the Jensen-Shannon one looks at."""


def check_vocabularies(student: int, teacher: int) -> None:
    """Raises ValueError for a teacher that speaks of other tokens.

    >>> check_vocabularies(64, 256)
    Traceback (most recent call last):
    ...
    ValueError: the teacher has a vocabulary of 256 tokens and the student one of 64: train the \
student with the teacher's tokenizer
    """
    if student != teacher:
        raise ValueError(
            f"the teacher has a vocabulary of {teacher} tokens and the student one of {student}: "
            "train the student with the teacher's tokenizer"
        )


def _log_distributions(
    student_NV: jax.Array, teacher_NV: jax.Array, weights_N: jax.Array, temperature: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log P, log Q and T; at least float32, uniform where the weight is 0."""
    check_vocabularies(student_NV.shape[-1], teacher_NV.shape[-1])
    if student_NV.shape != teacher_NV.shape or weights_N.shape != student_NV.shape[:1]:
        raise ValueError(
            f"student {student_NV.shape}, teacher {teacher_NV.shape} and weights "
            f"{weights_N.shape} must be [N, V], [N, V] and [N]"
        )
    if isinstance(temperature, float | int) and not temperature > 0:
        raise ValueError(f"the temperature is {temperature}; it must be above 0")
    dtype = at_least_float32(student_NV.dtype)
    T = jnp.asarray(temperature, dtype)
    live_N1 = weights_N[:, None] > 0

    # Before the softmax, not after the sum: there the gradient of what is not finite is not 0.
    def log_softmax(logits_NV: jax.Array) -> jax.Array:
        kept_NV = jnp.where(live_N1, logits_NV.astype(dtype), 0)
        return jax.nn.log_softmax(kept_NV / T, axis=-1)

    return log_softmax(teacher_NV), log_softmax(student_NV), T


def _kl(a_NV: jax.Array, b_NV: jax.Array) -> jax.Array:
    """KL(A || B) of log-probabilities, [N]; what A rules out counts nothing."""
    inside_NV = a_NV > -jnp.inf
    terms_NV = jnp.exp(a_NV) * (jnp.where(inside_NV, a_NV, 0) - jnp.where(inside_NV, b_NV, 0))
    return terms_NV.sum(axis=-1)


def _weighted(loss_N: jax.Array, weights_N: jax.Array) -> jax.Array:
    return (loss_N * weights_N.astype(loss_N.dtype)).sum()
