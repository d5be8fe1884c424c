"""Padding of the vocabulary: what it adds, that it changes nothing, and that it comes off again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.presets import gpt2_tiny, modern_tiny
from model.transformer import Transformer
from parallel.vocabulary import pad_vocabulary, padded_size, strip_vocabulary
from tests.compiled import logits_of
from train.losses import counts_of, cross_entropy, loss_function, z_loss
from train.plugs import Context

TOKENS = jnp.arange(12).reshape(2, 6) % 57


def params_of(config):
    return jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS)["params"]


@pytest.mark.parametrize("preset", [gpt2_tiny, modern_tiny])
@pytest.mark.parametrize("multiple", [1, 4, 64])
def test_padding_comes_off_again(strict, preset, multiple):
    params = params_of(preset(vocabulary_size=57))
    padded = pad_vocabulary(params, multiple)
    rows = padded_size(57, multiple)
    assert padded["token_embedding"]["embedding"].shape == (rows, 32)
    jax.tree.map(np.testing.assert_array_equal, strip_vocabulary(padded, 57), params)
    for path in ("blocks", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, padded[path], params[path])


@pytest.mark.parametrize("preset", [gpt2_tiny, modern_tiny])
def test_true_logits_stay_the_same(preset):
    model = Transformer(preset(vocabulary_size=57, dropout=0.0))
    params = params_of(model.config)
    expected = logits_of(model, params, TOKENS)
    got = logits_of(model, pad_vocabulary(params, 8), TOKENS)[..., :57]
    np.testing.assert_array_equal(got, expected)


def test_moments_are_padded_with_their_parameter():
    params = params_of(modern_tiny(vocabulary_size=57))
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_factored_rms())
    padded = pad_vocabulary(tx.init(params), 8)
    wanted = tx.init(pad_vocabulary(params, 8))[0]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), padded[0], wanted)


def test_what_does_not_fit():
    params = params_of(modern_tiny(vocabulary_size=57))
    with pytest.raises(ValueError, match=r"\(57, 32\) does not hold a vocabulary of 58"):
        strip_vocabulary({"token_embedding": params["token_embedding"]}, 58)
    with pytest.raises(ValueError, match="multiple of 0"):
        pad_vocabulary(params, 0)


def test_the_loss_of_padded_logits_is_that_of_the_others():
    """Padding weighs nothing in a softmax: same loss, same gradient, none for the padding."""
    model = Transformer(gpt2_tiny(vocabulary_size=57, dropout=0.0))
    params = params_of(model.config)
    batch = {"tokens": TOKENS, "targets": (TOKENS + 1) % 57, "weights": jnp.ones(TOKENS.shape)}

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, chunk):
        loss = loss_function(model, [cross_entropy(), z_loss()], chunk=chunk)
        counts = counts_of([cross_entropy(), z_loss()], batch)
        context = Context(jnp.int32(0), None, {}, {}, counts)
        return jax.value_and_grad(lambda p: loss(p, batch, context)[0])(params)

    value, grads = gradient(params, None)
    for chunk in (None, 5):
        with_padding, padded_grads = gradient(pad_vocabulary(params, 64), chunk)
        np.testing.assert_allclose(with_padding, value, rtol=1e-6)
        of_padding = padded_grads["token_embedding"]["embedding"][57:]
        np.testing.assert_array_equal(of_padding, np.zeros_like(of_padding))
        stripped = strip_vocabulary(padded_grads, 57)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stripped, grads)


def test_terms_that_look_at_all_logits_see_none_of_the_padding():
    """Label smoothing takes a mean over the vocabulary: 57 tokens, not 64."""
    model = Transformer(gpt2_tiny(vocabulary_size=57, dropout=0.0))
    params = params_of(model.config)
    batch = {"tokens": TOKENS, "targets": (TOKENS + 1) % 57, "weights": jnp.ones(TOKENS.shape)}
    terms = [cross_entropy(label_smoothing=0.1)]

    @jax.jit
    def value(params):
        context = Context(jnp.int32(0), None, {}, {}, counts_of(terms, batch))
        return loss_function(model, terms)(params, batch, context)[0]

    np.testing.assert_allclose(value(pad_vocabulary(params, 64)), value(params), rtol=1e-6)
