"""A teacher's distribution in a few numbers: its most probable tokens, or a sample of it.

A teacher that has spoken once need not run again: what is kept of each position is k token ids and
as many numbers, from which the student's loss is computed.

    top-k     the k most probable tokens and, as one more, all the others together
    sampled   k draws with weights that make the loss, and its gradient, the full one on average

Top-k without the tail, or renormalised, teaches a distribution that is not the teacher's; the
sample is unbiased at any k (Anshumann et al. 2025, arXiv:2503.16870).

Shapes: N positions, V vocabulary, k kept tokens.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from model.linear import at_least_float32

Targets = dict[str, jax.Array]
"""Name -> array [N, ...]: "ids" int32 [N, k] and what is said of them."""


def top_k_targets(logits_NV: jax.Array, k: int, temperature: float = 1.0) -> Targets:
    """Returns the k most probable tokens of `softmax(logits / T)` and the mass of the others.

    Args:
      logits_NV: of the teacher.
      k: from 1 to V - 1.
      temperature: T > 0, fixed from here on.

    Returns:
      "ids" int32 [N, k], "log_probs" float [N, k], "log_tail" float [N].

    Raises:
      ValueError: a k or temperature outside.

    >>> out = top_k_targets(jnp.log(jnp.array([[0.7, 0.1, 0.2]])), 1)
    >>> out["ids"].tolist(), round(float(jnp.exp(out["log_tail"][0])), 4)
    ([[0]], 0.3)
    """
    if not 1 <= k < logits_NV.shape[-1]:
        raise ValueError(
            f"k is {k}; it must be at least 1 and below the vocabulary of {logits_NV.shape[-1]}"
        )
    log_p_NV = _log_softmax(logits_NV, temperature)
    log_probs_Nk, ids_Nk = jax.lax.top_k(log_p_NV, k)
    log_tail_N = jax.nn.logsumexp(_without(log_p_NV, ids_Nk), axis=-1)
    return {"ids": ids_Nk, "log_probs": log_probs_Nk, "log_tail": log_tail_N}


def sampled_targets(
    key: jax.Array,
    logits_NV: jax.Array,
    k: int,
    *,
    temperature: float = 1.0,
    proposal: float = 1.0,
) -> Targets:
    """Returns k independent draws x_i from `q ~ p^proposal`, with their weights p(x_i) / q(x_i).

    Args:
      key: of the draws.
      logits_NV: of the teacher; `p = softmax(logits / T)`.
      k: draws, at least 1.
      temperature: T > 0, fixed from here on.
      proposal: 1 draws from p itself, and all weights are 1; below 1 draws rare tokens more often.

    Returns:
      "ids" int32 [N, k], "log_ratios" float [N, k].

    Raises:
      ValueError: a k, temperature or proposal outside.

    >>> out = sampled_targets(jax.random.key(0), jnp.array([[9.0, 0.0]]), 3)
    >>> out["ids"].tolist(), out["log_ratios"].tolist()
    ([[0, 0, 0]], [[0.0, 0.0, 0.0]])
    """
    if k < 1:
        raise ValueError(f"k is {k}; draw at least 1 token")
    if not proposal > 0:
        raise ValueError(f"the proposal's exponent is {proposal}; it must be above 0")
    log_p_NV = _log_softmax(logits_NV, temperature)
    log_q_NV = log_p_NV if proposal == 1 else jax.nn.log_softmax(proposal * log_p_NV, axis=-1)
    uniform_2Nk = jax.random.uniform(key, (2, len(log_q_NV), k), log_q_NV.dtype)
    ids_Nk = draws(jnp.exp(log_q_NV), uniform_2Nk)
    ratios = jnp.take_along_axis(log_p_NV - log_q_NV, ids_Nk, axis=-1)
    return {"ids": ids_Nk, "log_ratios": ratios}


def draws(q_NV: jax.Array, uniform_2Nk: jax.Array) -> jax.Array:
    """Returns k independent draws of each distribution, int32 [N, k], by the inverse of its sums.

    First a stretch of about sqrt(V) tokens is drawn, then one of its tokens: the sum of all would
    lose rare tokens in float32, and noise for every token and draw would take k times N x V.

    Args:
      q_NV: probabilities, or anything proportional to them.
      uniform_2Nk: from 0 to below 1.

    >>> uniform = jnp.full((2, 1, 2), 0.5).at[0, 0].set(jnp.array([0.2, 0.3]))
    >>> draws(jnp.array([[0.0, 1.0, 0.0, 3.0]]), uniform).tolist()
    [[1, 3]]
    """
    N, V = q_NV.shape
    size = math.isqrt(V - 1) + 1
    count = -(-V // size)
    q_NBS = jnp.pad(q_NV, ((0, 0), (0, count * size - V))).reshape(N, count, size)
    stretch_Nk = _where_sum_passes(q_NBS.sum(axis=-1)[:, None], uniform_2Nk[0])
    q_NkS = jnp.take_along_axis(q_NBS, stretch_Nk[..., None], axis=1)
    return size * stretch_Nk + _where_sum_passes(q_NkS, uniform_2Nk[1])


def top_k_kl(
    student_NV: jax.Array, targets: Targets, weights_N: jax.Array, temperature: Any = 1.0
) -> jax.Array:
    """`T^2 sum_n w_n KL(P'_n || Q'_n)` over the k tokens and all the others as one.

    At most the full divergence, and equal to it for k = V - 1. It does not say how the student is
    to share out the tail.

    Args:
      student_NV: logits.
      targets: from `top_k_targets`, with the same temperature.
      weights_N: 0 where nothing counts.
      temperature: T.

    >>> teacher = jnp.log(jnp.array([[0.7, 0.1, 0.2]]))
    >>> abs(float(top_k_kl(teacher, top_k_targets(teacher, 2), jnp.ones(1)))) < 1e-6
    True
    """
    log_q_NV = _log_softmax(_live(student_NV, weights_N), temperature)
    dtype = log_q_NV.dtype
    log_q_Nk = jnp.take_along_axis(log_q_NV, targets["ids"], axis=-1)
    log_q_tail_N = jax.nn.logsumexp(_without(log_q_NV, targets["ids"]), axis=-1)
    log_q = jnp.concatenate([log_q_Nk, log_q_tail_N[:, None]], axis=-1)
    log_p = jnp.concatenate([targets["log_probs"], targets["log_tail"][:, None]], axis=-1)
    log_p = log_p.astype(dtype)
    there = log_p > -jnp.inf
    terms = jnp.exp(log_p) * (jnp.where(there, log_p, 0) - jnp.where(there, log_q, 0))
    T = jnp.asarray(temperature, dtype)
    return T**2 * _weighted(terms.sum(axis=-1), weights_N)


def sampled_cross_entropy(
    student_NV: jax.Array, targets: Targets, weights_N: jax.Array, temperature: Any = 1.0
) -> jax.Array:
    """`-T^2 sum_n w_n 1/k sum_i p(x_i) / q(x_i) log Q_n(x_i)`.

    On average over the draws this is the cross-entropy of teacher and student, which is the
    forward divergence and the teacher's entropy, a constant: so the expected gradient is that of
    the full divergence.

    Args:
      student_NV: logits.
      targets: from `sampled_targets`, with the same temperature.
      weights_N: 0 where nothing counts.
      temperature: T.

    >>> targets = {"ids": jnp.array([[0, 1]]), "log_ratios": jnp.zeros((1, 2))}
    >>> round(float(sampled_cross_entropy(jnp.zeros((1, 4)), targets, jnp.ones(1))), 4)  # log 4
    1.3863
    """
    log_q_NV = _log_softmax(_live(student_NV, weights_N), temperature)
    log_q_Nk = jnp.take_along_axis(log_q_NV, targets["ids"], axis=-1)
    ratios_Nk = jnp.exp(targets["log_ratios"].astype(log_q_NV.dtype))
    T = jnp.asarray(temperature, log_q_NV.dtype)
    return -(T**2) * _weighted((ratios_Nk * log_q_Nk).mean(axis=-1), weights_N)


def _log_softmax(logits_NV: jax.Array, temperature: Any) -> jax.Array:
    if isinstance(temperature, float | int) and not temperature > 0:
        raise ValueError(f"the temperature is {temperature}; it must be above 0")
    dtype = at_least_float32(logits_NV.dtype)
    return jax.nn.log_softmax(logits_NV.astype(dtype) / jnp.asarray(temperature, dtype), axis=-1)


def _where_sum_passes(q: jax.Array, uniform_Nk: jax.Array) -> jax.Array:
    """First index of the last axis at which the running sum is above that share of the whole."""
    sums = jnp.cumsum(q, axis=-1)
    return (sums <= uniform_Nk[..., None] * sums[..., -1:]).sum(axis=-1, dtype=jnp.int32)


def _without(log_NV: jax.Array, ids_Nk: jax.Array) -> jax.Array:
    """-inf at the ids."""
    return log_NV.at[jnp.arange(log_NV.shape[0])[:, None], ids_Nk].set(-jnp.inf)


def _live(logits_NV: jax.Array, weights_N: jax.Array) -> jax.Array:
    return jnp.where(weights_N[:, None] > 0, logits_NV, 0)


def _weighted(loss_N: jax.Array, weights_N: jax.Array) -> jax.Array:
    weights_N = weights_N.astype(loss_N.dtype)
    return jnp.where(weights_N > 0, loss_N * weights_N, 0).sum()
