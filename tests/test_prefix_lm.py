"""A prefix that all queries see, in every form of attention and through the model."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import attention
from model.attention import Visibility, dot_product_attention, visible
from model.cache import init_cache
from model.presets import gpt2_tiny, modern_tiny
from model.transformer import Transformer, features
from train.losses import counts_of, cross_entropy, loss_function
from train.plugs import Context

KEY = jax.random.key(0)
T = 10
SEGMENTS = (jnp.arange(T)[None] >= jnp.array([[3], [6]])).astype(jnp.int32)
FLAGS = jnp.isin(jnp.arange(T), jnp.array([0, 1, 6, 7]))[None].repeat(2, axis=0)
SEEN = {
    "counted": Visibility(prefix=jnp.array([4, 0])),
    "packed": Visibility(segments=SEGMENTS, prefix=FLAGS),
    "window": Visibility(window=2, prefix=jnp.array([2, 10])),
    "whole": Visibility(segments=SEGMENTS, prefix=jnp.array([T, T])),
}


@pytest.mark.parametrize("seen", SEEN)
def test_the_mask_says_what_the_words_say(seen):
    given = SEEN[seen]
    mask = np.asarray(visible(given, T, T)) & np.ones((2, 1, 1), bool)
    for row, query, key in itertools.product(range(2), range(T), range(T)):
        prefix = np.asarray(given.prefix)[row]
        early = bool(prefix[key]) if prefix.ndim else key < prefix
        near = key <= query and (given.window is None or query - key < given.window)
        same = given.segments is None or SEGMENTS[row, query] == SEGMENTS[row, key]
        assert mask[row, query, key] == (same and (early or near))


@pytest.mark.variants(2)
@pytest.mark.parametrize("seen", SEEN)
def test_the_form_for_cpu_has_values_and_gradients_of_the_plain_one(seen, strict, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    shapes = [(2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 8)]
    arrays = [
        jax.random.normal(k, s) for k, s in zip(jax.random.split(KEY, 3), shapes, strict=True)
    ]
    weights = jax.random.normal(jax.random.key(1), shapes[0])

    def outcome(platform):
        def value(q, k, v):
            out = dot_product_attention(q, k, v, SEEN[seen], platform=platform)
            return (jnp.sin(out) * weights).sum()

        return jax.jit(jax.value_and_grad(value, (0, 1, 2)))(*arrays)

    for a, b in zip(*map(jax.tree.leaves, (outcome("cpu"), outcome("gpu"))), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@functools.cache
def whole(model):
    """The compiled features of a model."""
    return jax.jit(functools.partial(features, model))


def built(config=None):
    model = Transformer(modern_tiny(zero_init_projections=False) if config is None else config)
    tokens = jax.random.randint(jax.random.key(2), (2, T), 0, 64)
    return model, jax.jit(model.init)(KEY, tokens)["params"], tokens


def test_no_prefix_is_causal_and_a_prefix_shows_its_own_future_alone(strict):
    model, params, tokens = built()
    run = jax.jit(lambda t, prefix: features(model, params, t, prefix=prefix).final)
    causal = whole(model)(params, tokens).final
    np.testing.assert_allclose(run(tokens, jnp.array([0, 0])), causal, rtol=1e-5, atol=1e-6)
    prefix, changed = jnp.array([4, 4]), {}
    for place in (3, 5):
        other = tokens.at[:, place].set((tokens[:, place] + 1) % 64)
        apart = np.abs(run(other, prefix) - run(tokens, prefix)).max(axis=(0, 2))
        changed[place] = (apart > 1e-6).tolist()
    assert changed[3] == [True] * T
    assert changed[5] == [False] * 5 + [True] * (T - 5)


def test_flags_are_the_same_as_numbers_and_packed_rows_as_rows_apart(strict):
    model, params, tokens = built()
    flags = (jnp.arange(T)[None] < jnp.array([[4], [2]])).astype(jnp.int32)
    counted = whole(model)(params, tokens, prefix=jnp.array([4, 2])).final
    np.testing.assert_allclose(
        whole(model)(params, tokens, prefix=flags).final, counted, rtol=1e-5, atol=1e-6
    )
    packed = tokens.reshape(1, 2 * T)
    segments = jnp.repeat(jnp.array([[1, 2]]), T, axis=1)
    positions = jnp.tile(jnp.arange(T), 2)[None]
    both = whole(model)(params, packed, positions, segments, prefix=flags.reshape(1, 2 * T)).final
    np.testing.assert_allclose(both.reshape(2, T, -1), counted, rtol=1e-4, atol=1e-5)


def test_with_a_cache_the_prefix_goes_in_first(strict):
    model, params, tokens = built(gpt2_tiny(dropout=0.0))
    prefix = jnp.array([6, 4])
    expected = whole(model)(params, tokens, prefix=prefix).final
    cache = init_cache(model.config, 2, T)
    first = whole(model)(params, tokens[:, :6], cache=cache, prefix=prefix)
    rest = whole(model)(params, tokens[:, 6:], cache=first.cache)
    found = jnp.concatenate([first.final, rest.final], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="number of tokens"):
        features(model, params, tokens, cache=cache, prefix=tokens)


def test_it_reaches_the_model_through_the_loss(strict):
    model, params, tokens = built()
    terms = (cross_entropy(),)
    batch = {"tokens": tokens, "targets": tokens, "weights": jnp.ones((2, T))}
    loss = jax.jit(loss_function(model, terms))

    def value(batch):
        context = Context(jnp.int32(0), None, {}, {}, counts_of(terms, batch))
        return float(loss(params, batch, context)[0])

    # A prefix of the whole row shows each token its own target's place as well.
    apart = value(batch) - value({**batch, "prefix": jnp.array([T, T])})
    assert abs(apart) > 1e-4
    np.testing.assert_allclose(value({**batch, "prefix": jnp.array([0, 0])}), value(batch), 1e-6)


def test_tokens_of_a_prefix_are_not_left_out(strict):
    model, params, tokens = built(dataclasses.replace(modern_tiny(layers=3), token_drop=0.5))
    with pytest.raises(ValueError, match="prefix"):
        features(model, params, tokens, prefix=jnp.array([2, 2]), dropout_key=KEY)
