"""Wanda against a slow NumPy account of it, on the inputs that the pruned layers give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.pruning.masks import n_of_m
from compress.pruning.wanda import wanda, wanda_score
from experiments.compression.compressors import Magnitude, Wanda
from model.presets import llama_tiny
from model.transformer import Transformer, features

MODEL = Transformer(llama_tiny(scan_layers=True))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 8)), jnp.int32)


def params_of():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(draw.normal(0, 0.3, s.shape), s.dtype), shapes)


PARAMS = params_of()


def slow(w, x, keep_of):
    """Zeros one output at a time, by sorting."""
    norms = np.sqrt((x**2).sum(axis=0))
    pruned = w.copy()
    for o in range(w.shape[1]):
        score = np.abs(w[:, o]) * norms
        for group in np.arange(len(score)).reshape(-1, keep_of[1]):
            order = group[np.argsort(-score[group], kind="stable")]
            pruned[order[keep_of[0] :], o] = 0
    return pruned


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    ("pattern", "keep_of"), [(None, (16, 32)), (n_of_m(4), (2, 4))], ids=["outputs", "2:4"]
)
def test_it_is_the_slow_one_layer_after_layer(pattern, keep_of):
    options = {} if pattern is None else {"pattern": pattern}
    pruned = wanda(MODEL, PARAMS, [TOKENS[:1], TOKENS[1:]], 0.5, **options)
    hidden = features(MODEL, pruned, TOKENS, capture=("hidden",)).hidden
    for layer in range(2):  # q, k, v read the normalised stream that the pruned layers give
        x = np.asarray(hidden[layer], np.float64)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + MODEL.config.norm_epsilon)
        x = (x * np.asarray(pruned["blocks"]["attention_norm"]["scale"][layer])).reshape(-1, 32)
        for name in ("q", "k", "v"):
            w = np.asarray(PARAMS["blocks"]["attention"][name]["kernel"][layer])
            got = np.asarray(pruned["blocks"]["attention"][name]["kernel"][layer])
            np.testing.assert_array_equal(got, slow(w, x, keep_of))
    for kernel in (pruned["blocks"]["mlp"][name]["kernel"] for name in ("up", "gate", "down")):
        assert ((kernel == 0).mean(axis=1) == 0.5).all()  # of every output
    np.testing.assert_array_equal(pruned["head"]["kernel"], PARAMS["head"]["kernel"])


def test_inputs_count(strict):
    w, x = jnp.ones((2, 3)), jnp.array([9.0, 4.0])
    assert wanda_score(w, x)[:, 0].tolist() == [3.0, 2.0]


def test_weights_are_compared_within_an_output_or_a_kernel():
    """Of both scores; half of the weights go in either way."""
    for score in (Magnitude, Wanda):
        within = {"by_output": score is Magnitude, "by_kernel": score is Wanda}
        ways = ["unstructured", *(name for name, there in within.items() if there)]
        for way in ways:
            _, pruned = score(0.5, way)(MODEL, PARAMS, [TOKENS])
            zeros = np.asarray(pruned["blocks"]["mlp"]["up"]["kernel"]) == 0
            assert zeros.mean() == pytest.approx(0.5)
            by_output = way == "by_output" or (score is Wanda and way == "unstructured")
            assert (zeros.mean(axis=1) == 0.5).all() == by_output


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="leaves no weight"):
        wanda(MODEL, PARAMS, [TOKENS], 1.0)
    with pytest.raises(ValueError, match="no batch of tokens"):
        wanda(MODEL, PARAMS, [], 0.5)
    with pytest.raises(ValueError, match="do not divide"):
        wanda(MODEL, PARAMS, [TOKENS], 0.5, n_of_m(5))
