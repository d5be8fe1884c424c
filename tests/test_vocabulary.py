"""Padding of the vocabulary: what it adds, that it changes nothing, and that it comes off again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.presets import gpt2_tiny, modern_tiny
from model.transformer import Transformer
from parallel.vocabulary import pad_vocabulary, padded_size, strip_vocabulary
from tests.compiled import logits_of

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
