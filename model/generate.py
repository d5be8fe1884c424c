"""Generation: prompts of any lengths in, tokens out, one compilation for all of them.

Prompts go through the model in chunks of a fixed size inside one `while_loop`, then tokens follow
one by one. Every row keeps its own length in the cache, so ragged prompts need no mask.

Shapes: B batch, S cache slots, C chunk, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.cache import WHOLE, Cache, init_cache
from model.config import TransformerConfig
from model.rules import STACK
from model.stack import apart, layers_of, stack_of, together
from model.transformer import Transformer, features, head

MakeCache = Callable[[TransformerConfig, int, int], Cache]
"""`(config, batch, slots) -> an empty cache`."""

CHUNK = 32  # prompt tokens per pass: products are near full speed on CPU, padding stays small


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
      temperature: logits are divided by it; 0 takes the most probable token (greedy).
      top_k: keep the k most probable tokens; None keeps all.
      top_p: keep the smallest set of tokens whose probability reaches p (nucleus sampling, Holtzman
        et al. 2020, arXiv:1904.09751); None keeps all. Applied after `top_k`.

    >>> Sampling(temperature=-1)
    Traceback (most recent call last):
    ...
    ValueError: temperature is -1; it must be 0 (greedy) or more
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


class Generation(NamedTuple):
    """What was generated.

    Attributes:
      tokens: int32 [B, S], the prompt followed by the new tokens; what lies past `lengths` is 0.
      lengths: int32 [B], tokens that count, prompt and stop token included.
      prompt_lengths: int32 [B].
    """

    tokens: jax.Array
    lengths: jax.Array
    prompt_lengths: jax.Array

    def new_tokens(self) -> list[list[int]]:
        """Returns the new tokens of each row, without the prompt, as lists."""
        rows = zip(
            np.asarray(self.tokens),
            np.asarray(self.prompt_lengths),
            np.asarray(self.lengths),
            strict=True,
        )
        return [row[start:end].tolist() for row, start, end in rows]


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token id for each row of logits: int32 [B].

    >>> sample(jnp.array([[0.0, 2.0, 1.0]]), jax.random.key(0), Sampling(temperature=0)).tolist()
    [1]
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    lowest = jnp.finfo(logits_BV.dtype).min
    if sampling.top_k is not None:
        k = min(sampling.top_k, logits_BV.shape[-1])
        kth_B1 = jax.lax.top_k(logits_BV, k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, lowest, logits_BV)
    if sampling.top_p is not None:
        order_BV = jnp.flip(jnp.argsort(logits_BV, axis=-1), axis=-1)
        sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
        # A token stays if those more probable than it have not reached p: the first always does.
        stays_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV < sampling.top_p
        rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
        keep_BV = jnp.zeros_like(stays_BV).at[rows_B1, order_BV].set(stays_BV)
        logits_BV = jnp.where(keep_BV, logits_BV, lowest)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    key: jax.Array,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    slots: int | None = None,
    cache: MakeCache = init_cache,
) -> Generation:
    """Continues each prompt by up to `max_new_tokens` tokens, or up to and with a stop token.

    Compiled once for each (model, batch size, slots, cache, sampling, number of stop tokens):
    prompt lengths and `max_new_tokens` may vary freely.

    Args:
      model: the Transformer.
      params: its parameters (`variables["params"]`).
      prompts: token ids, one sequence a row, of any lengths from 1.
      key: PRNG key of the draws.
      max_new_tokens: at most so many new tokens a row.
      sampling: how tokens are drawn.
      stop_tokens: ids that end a row.
      slots: size of the cache, `config.max_length` by default.
      cache: makes the empty cache; one in 8 bits is `compress.quantization.kv_cache.int8_cache`.

    Raises:
      ValueError: if a prompt is empty, is no row of ids of the vocabulary, or leaves no room for
        the new tokens in the cache; or if the parameters are not those of the model.

    >>> from model.presets import gpt2_tiny
    >>> model = Transformer(gpt2_tiny())
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> out = generate(model, params, [[1], [1, 2, 3]], key=jax.random.key(1), max_new_tokens=4)
    >>> [len(row) for row in out.new_tokens()]
    [4, 4]
    """
    config = model.config
    slots = config.max_length if slots is None else slots
    if STACK not in params:
        raise ValueError(
            f"the parameters of a decoder-only model have {STACK!r} at the top, not "
            f"{', '.join(map(repr, params))}; of what `init` returns, give variables['params']"
        )
    ids = [np.asarray(prompt) for prompt in prompts]
    if wrong := [row for row in ids if row.ndim != 1 or (row.size and row.dtype.kind not in "iu")]:
        raise ValueError(f"a prompt is a row of token ids, such as [1, 2, 3], not {wrong[0]}")
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise ValueError("every prompt needs at least one token; start from end-of-document")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if max(lengths) + max_new_tokens > slots:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and {max_new_tokens} new ones need "
            f"{max(lengths) + max_new_tokens} cache slots; there are {slots}"
        )
    # The buffer is a whole number of chunks, so that the last chunk of a prompt fits.
    chunk = _chunk(config)
    padded = -(-slots // chunk) * chunk
    buffer = np.zeros((len(lengths), padded), np.int32)
    for row, prompt in zip(buffer, prompts, strict=True):
        row[: len(prompt)] = prompt
    if buffer.min() < 0 or buffer.max() >= config.vocabulary_size:
        bad = buffer.max() if buffer.max() >= config.vocabulary_size else buffer.min()
        raise ValueError(f"token id {bad} is outside the vocabulary of {config.vocabulary_size}")
    tokens, ends = _generate(
        model,
        sampling,
        slots,
        cache,
        params,
        jnp.asarray(buffer),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(max_new_tokens, jnp.int32),
        jnp.asarray(stop_tokens, jnp.int32).reshape(-1),
        key,
    )
    return Generation(tokens[:, :slots], ends, jnp.asarray(lengths, jnp.int32))


def continue_rows(
    model: Transformer,
    params: Any,
    prompts_BP: jax.Array,
    *,
    key: jax.Array,
    length: int,
    sampling: Sampling = Sampling(),
    cache: MakeCache = init_cache,
) -> jax.Array:
    """Like `generate` for prompts of one length, without stop tokens; traceable.

    Args:
      model: the Transformer.
      params: its parameters.
      prompts_BP: int32 ids, P at least 1 and below `length`.
      key: of the draws.
      length: tokens of a row in the end.
      sampling: how tokens are drawn.
      cache: see `generate`.

    Returns:
      int32 [B, length], the prompts and what follows.

    >>> from model.presets import gpt2_tiny
    >>> model = Transformer(gpt2_tiny())
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> prompts = jnp.array([[1, 2], [3, 4]])
    >>> continue_rows(model, params, prompts, key=jax.random.key(1), length=5)[:, :2].tolist()
    [[1, 2], [3, 4]]
    """
    B, P = prompts_BP.shape
    chunk = _chunk(model.config)
    padded = -(-length // chunk) * chunk
    buffer_BS = jnp.pad(prompts_BP.astype(jnp.int32), ((0, 0), (0, padded - P)))
    lengths_B = jnp.full((B,), P, jnp.int32)
    none = jnp.zeros((0,), jnp.int32)
    more = jnp.int32(length - P)
    arguments = (params, buffer_BS, lengths_B, more, none, key)
    return _generate(model, sampling, length, cache, *arguments)[0][:, :length]


def _chunk(config: TransformerConfig) -> int:
    """Prompt tokens per pass: no more than there are learned positions."""
    return min(CHUNK, config.max_length) if config.positions == "learned" else CHUNK


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: Transformer,
    sampling: Sampling,
    slots: int,
    make_cache: MakeCache,
    params: Any,
    tokens_BS: jax.Array,
    lengths_B: jax.Array,
    max_new_tokens: jax.Array,
    stop_tokens: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    B = tokens_BS.shape[0]
    chunk = _chunk(model.config)
    last_B = lengths_B - 1
    # Taken apart once: sliced inside the loop, every weight would be copied once a token.
    by_layer = apart(params)

    def run(ids_BT, positions, cache_by_layer):
        """`features` with weights and cache layer by layer, so that no step copies either."""
        cache = {n: p if n in WHOLE else stack_of(p) for n, p in cache_by_layer.items()}
        out = features(model, together(by_layer), ids_BT, positions, cache=cache)
        assert out.cache is not None
        return out.final, _cache_by_layer(out.cache, model.config.layers)

    def read_chunk(carry):
        start, cache, final_BD = carry
        chunk_BC = jax.lax.dynamic_slice_in_dim(tokens_BS, start, chunk, axis=1)
        places = start + jnp.arange(chunk)
        if model.config.positions == "learned":
            # Padding may reach past them; clipped, since nothing sees it.
            places = jnp.minimum(places, model.config.max_length - 1)
        positions = places[None] + jnp.zeros((B, 1), jnp.int32)
        final_BCD, cache = run(chunk_BC, positions, cache)
        here_B = (last_B >= start) & (last_B < start + chunk)
        offset_B = jnp.clip(last_B - start, 0, chunk - 1)
        picked_BD = jnp.take_along_axis(final_BCD, offset_B[:, None, None], axis=1)[:, 0]
        return start + chunk, cache, jnp.where(here_B[:, None], picked_BD, final_BD)

    def put(tokens_BS, final_BD, ends_B, live_B, step):
        """Draws token number `step` of each row, writes it, and says which rows go on."""
        logits_BV = head(model, params, final_BD)
        ids_B = sample(logits_BV, jax.random.fold_in(key, step), sampling)
        slots_B = jnp.where(live_B, ends_B, tokens_BS.shape[1])  # past the end: dropped
        tokens_BS = tokens_BS.at[jnp.arange(B), slots_B].set(ids_B, mode="drop")
        ends_B = ends_B + live_B.astype(jnp.int32)
        stopped_B = (ids_B[:, None] == stop_tokens[None]).any(axis=1)
        live_B = live_B & ~stopped_B & (step + 1 < max_new_tokens)
        return tokens_BS, ids_B, ends_B, live_B, step + 1

    def add_token(carry):
        # A row that has stopped writes on past its end, unseen. The last token is never read.
        (tokens_BS, ids_B, ends_B, live_B, step), cache = carry
        final_B1D, cache = run(ids_B[:, None], None, cache)
        return put(tokens_BS, final_B1D[:, 0], ends_B, live_B, step), cache

    config = model.config
    cache = _cache_by_layer(make_cache(config, B, slots), config.layers)
    final_BD = jnp.zeros((B, config.width), jnp.dtype(config.dtype))
    _, cache, final_BD = jax.lax.while_loop(
        lambda carry: carry[0] < lengths_B.max(), read_chunk, (jnp.int32(0), cache, final_BD)
    )
    cache = {**cache, "length": lengths_B}
    first = put(tokens_BS, final_BD, lengths_B, jnp.ones((B,), bool), jnp.int32(0))
    (tokens_BS, _, ends_B, _, _), _ = jax.lax.while_loop(
        lambda carry: carry[0][3].any(), add_token, (first, cache)
    )
    return tokens_BS, ends_B


def _cache_by_layer(cache: Cache, layers: int) -> dict[str, Any]:
    """Returns the cache with the stacked parts as lists by layer, which a loop updates in place."""
    return {n: part if n in WHOLE else layers_of(part, layers) for n, part in cache.items()}
