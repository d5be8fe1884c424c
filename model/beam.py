"""Beam search: the most probable continuations under a model, by a penalised sum of log p.

    score(y) = log p(y | x) / lp(|y|),   lp(n) = ((5 + n) / 6)^alpha

after Wu et al. 2016 (arXiv:1609.08144, section 7, without the coverage term). Each step extends the
K live beams of a row by every token. Of the K best extensions those that end are put aside; the K
best that do not end go on. A row is done when K have ended, or when the best of them cannot be
beaten: log p only falls, so that what a live beam can still reach is its log p over the penalty of
the greatest length. With one beam this is greedy search.

Shapes: B rows, K beams, N = B K, V vocabulary, T new tokens, P prompt, S source.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.cache import WHOLE, init_cache
from model.encoder_decoder import CROSS
from model.transformer import Model, features, head

FIXED = (*CROSS, "source_segments")
"""Parts of a cache that are the same for all beams of a row, and never change."""


@dataclass(frozen=True)
class Beam:
    """How to search.

    Attributes:
      width: beams K; 1 is greedy search.
      alpha: length penalty; 0 compares plain sums of log p, which prefers short answers.
      max_new_tokens: T, the end token included; what has not ended by then ends there.

    >>> Beam(width=0)
    Traceback (most recent call last):
    ...
    ValueError: the width is 0; it must be at least 1
    """

    width: int = 4
    alpha: float = 0.6
    max_new_tokens: int = 64

    def __post_init__(self):
        for name in ("width", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"the {name} is {getattr(self, name)}; it must be at least 1")
        if self.alpha < 0:
            raise ValueError(f"alpha is {self.alpha}; it must be at least 0")


class Found(NamedTuple):
    """What was found for each row, the best first.

    Attributes:
      tokens: int32 [B, K, T], the end token included where there is one, then 0.
      lengths: int32 [B, K], tokens that count.
      log_probabilities: float32 [B, K], the sum of log p of those tokens; -inf for a beam that is
        none: the search ends where no live beam can beat the best that ended, and fewer than K may
        have ended by then. The best one is always there.
      scores: float32 [B, K], that sum over the length penalty.
      steps: int32 scalar, tokens that were tried before all rows were done.
    """

    tokens: jax.Array
    lengths: jax.Array
    log_probabilities: jax.Array
    scores: jax.Array
    steps: jax.Array


class _Search(NamedTuple):
    """Live beams, ended beams, and the cache of the live ones."""

    step: jax.Array
    live_BKT: jax.Array
    live_logp_BK: jax.Array
    ended_BKT: jax.Array
    ended_logp_BK: jax.Array
    ended_score_BK: jax.Array
    ended_length_BK: jax.Array
    next_N: jax.Array
    done_B: jax.Array
    cache: Any


def length_penalty(length: jax.Array, alpha: float) -> jax.Array:
    """Returns `((5 + n) / 6)^alpha` (Wu et al. 2016, equation 14).

    >>> float(length_penalty(jnp.int32(1), 0.6)), float(length_penalty(jnp.int32(7), 1.0))
    (1.0, 2.0)
    """
    return ((5.0 + length.astype(jnp.float32)) / 6.0) ** alpha


@functools.partial(jax.jit, static_argnames=("model", "beam"))
def beam_search(
    model: Model,
    params: Any,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    *,
    beam: Beam,
    end_token: jax.Array | int,
    inputs: Mapping[str, jax.Array] | None = None,
) -> Found:
    """Continues each prompt up to the end token. Compiled once for each model, beam and shape.

    Args:
      model: a `Transformer` or an `EncoderDecoder`.
      params: its parameters.
      prompts_BP: int32, padded at the right; with an encoder-decoder, what the target starts with.
      lengths_B: int32, tokens of each prompt that count, at least 1.
      beam: how to search.
      end_token: ends a continuation.
      inputs: what the model takes besides, by name: `prefix` (int32 [B]), `source` and
        `source_segments` ([B, S]).

    Returns:
      The best continuations of each row, K at most.

    Raises:
      ValueError: learned positions end before prompt and continuation do.

    >>> from model.presets import gpt2_tiny
    >>> from model.transformer import Transformer
    >>> model, prompts = Transformer(gpt2_tiny(dropout=0.0)), jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), prompts)["params"]
    >>> beam, lengths = Beam(2, max_new_tokens=5), jnp.array([3])
    >>> found = beam_search(model, params, prompts, lengths, beam=beam, end_token=0)
    >>> found.tokens.shape, bool((found.scores[:, 0] >= found.scores[:, 1]).all())
    ((1, 2, 5), True)
    """
    B, P = prompts_BP.shape
    K, T = beam.width, beam.max_new_tokens
    V = model.config.vocabulary_size
    cache = init_cache(model.config, B, P + T)
    more: dict[str, Any] = dict(inputs or {})
    out = features(model, params, prompts_BP, cache=cache, **more)
    last_B11 = (lengths_B - 1)[:, None, None]
    final_BD = jnp.take_along_axis(out.final, last_B11, axis=1)[:, 0]
    assert out.cache is not None
    # Keys of padding lie past the length, and are written over before any query can see them.
    cache = {**out.cache, "length": lengths_B}
    fixed = {name: _repeated(cache[name], name, K) for name in FIXED if name in cache}
    moving = {name: _repeated(cache[name], name, K) for name in cache if name not in FIXED}
    longest = length_penalty(jnp.int32(T), beam.alpha)

    def extend(search: _Search, logp_BKV: jax.Array) -> _Search:
        """Takes log p of every next token of the live beams; their cache is not yet moved."""
        total_BKV = search.live_logp_BK[:, :, None] + logp_BKV
        wide = min(2 * K, K * V)
        best_BJ, flat_BJ = jax.lax.top_k(total_BKV.reshape(B, K * V), wide)
        parent_BJ, token_BJ = flat_BJ // V, (flat_BJ % V).astype(jnp.int32)
        tokens_BJT = jnp.take_along_axis(search.live_BKT, parent_BJ[:, :, None], axis=1)
        tokens_BJT = jax.lax.dynamic_update_slice_in_dim(
            tokens_BJT, token_BJ[:, :, None], search.step, axis=2
        )
        length = search.step + 1
        ends_BJ = (token_BJ == end_token) | (length == T)
        # What a row finds must not depend on how long the others go on.
        counts_BJ = ends_BJ & (jnp.arange(wide)[None] < K) & ~search.done_B[:, None]
        scores_BJ = jnp.where(counts_BJ, best_BJ / length_penalty(length, beam.alpha), -jnp.inf)

        all_scores = jnp.concatenate([search.ended_score_BK, scores_BJ], axis=1)
        score_BK, kept_BK = jax.lax.top_k(all_scores, K)

        def kept(old: jax.Array, new: jax.Array) -> jax.Array:
            both = jnp.concatenate([old, new], axis=1)
            index = kept_BK.reshape(*kept_BK.shape, *[1] * (both.ndim - 2))
            return jnp.take_along_axis(both, index, axis=1)

        lengths_BJ = jnp.full_like(token_BJ, length)
        going_BJ = jnp.where(ends_BJ, -jnp.inf, best_BJ)
        live_logp_BK, at_BK = jax.lax.top_k(going_BJ, K)
        live_BKT = jnp.take_along_axis(tokens_BJT, at_BK[:, :, None], axis=1)
        parent_BK = jnp.take_along_axis(parent_BJ, at_BK, axis=1)
        rows_N = (jnp.arange(B)[:, None] * K + parent_BK).reshape(-1)
        beaten_B = live_logp_BK.max(axis=1) / longest <= score_BK.max(axis=1)
        done_B = search.done_B | beaten_B | jnp.isfinite(score_BK).all(axis=1)
        return _Search(
            length,
            live_BKT,
            live_logp_BK,
            kept(search.ended_BKT, tokens_BJT),
            kept(search.ended_logp_BK, jnp.where(ends_BJ, best_BJ, -jnp.inf)),
            score_BK,
            kept(search.ended_length_BK, lengths_BJ),
            jnp.take_along_axis(token_BJ, at_BK, axis=1).reshape(-1),
            done_B,
            {name: _rows(part, name, rows_N) for name, part in search.cache.items()},
        )

    def log_probabilities(final_MD: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(head(model, params, final_MD).astype(jnp.float32), axis=-1)

    def goes_on(search: _Search) -> jax.Array:
        return (search.step < T) & ~search.done_B.all()

    def step(search: _Search) -> _Search:
        whole = {**search.cache, **fixed}
        out = features(model, params, search.next_N[:, None], cache=whole)
        assert out.cache is not None
        cache = {name: out.cache[name] for name in search.cache}
        logp_BKV = log_probabilities(out.final[:, 0]).reshape(B, K, V)
        return extend(search._replace(cache=cache), logp_BKV)

    low_BK = jnp.full((B, K), -jnp.inf)
    none_BKT, zero_BK = jnp.zeros((B, K, T), jnp.int32), jnp.zeros((B, K), jnp.int32)
    start = _Search(
        jnp.int32(0),
        none_BKT,
        low_BK.at[:, 0].set(0.0),  # all beams of a row are one at first
        none_BKT,
        low_BK,
        low_BK,
        zero_BK,
        zero_BK.reshape(-1),
        jnp.zeros((B,), bool),
        moving,
    )
    first_B1V = log_probabilities(final_BD)[:, None]
    search = extend(start, jnp.broadcast_to(first_B1V, (B, K, V)))
    search = jax.lax.while_loop(goes_on, step, search)
    real_BK = jnp.isfinite(search.ended_score_BK)
    return Found(
        jnp.where(real_BK[:, :, None], search.ended_BKT, 0),
        jnp.where(real_BK, search.ended_length_BK, 0),
        search.ended_logp_BK,
        search.ended_score_BK,
        search.step,
    )


def _axis(name: str) -> int:
    return 0 if name in WHOLE else 1


def _repeated(part: Any, name: str, times: int) -> Any:
    return jax.tree.map(lambda a: jnp.repeat(a, times, axis=_axis(name)), part)


def _rows(part: Any, name: str, rows_N: jax.Array) -> Any:
    return jax.tree.map(lambda a: jnp.take(a, rows_N, axis=_axis(name)), part)
