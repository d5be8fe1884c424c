"""Integer products: against integers by NumPy, and the model that takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.quantization.quantize import quantize_params, weight_rules
from compress.quantization.rounding import quantize
from compress.quantization.w8a8 import (
    W8A8,
    Activation,
    Range,
    activation_ranges,
    integer_products,
    quantize_activations,
)
from model.flops import abstract_params
from model.presets import gpt2_tiny, llama_tiny
from model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("strict")
X = jax.random.normal(jax.random.key(0), (3, 5, 64)) * 2 + 0.7
W = jax.random.normal(jax.random.key(1), (64, 24))
KINDS = [
    Activation(),
    Activation(share="tensor"),
    Activation(offset="zero_point"),
    Activation(share="tensor", offset="zero_point"),
    Activation("static", "tensor"),
    Activation("static", "tensor", "zero_point"),
]


def product(activation, q, x=X):
    ranges = {"w": Range(x.min(), x.max())}
    return integer_products({"w": q}, activation, ranges=ranges)["w"]


@pytest.mark.variants(3)
@pytest.mark.parametrize("activation", KINDS, ids=str)
def test_against_integers_by_numpy(activation):
    q = quantize(W, "int8")
    x = np.asarray(X, np.float64).reshape(-1, 64)
    axis = -1 if activation.share == "token" else None
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    if activation.offset == "none":
        scale, zero = np.maximum(high, -low) / 127, 0
        numbers = np.round(x / scale)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / 255
        zero = -128 - np.round(low / scale)
        numbers = np.clip(np.round(x / scale) + zero, -128, 127)
    integers = (numbers - zero) @ np.asarray(q.values, np.int64)
    expected = (integers * scale * np.asarray(q.scales)).reshape(3, 5, 24)
    w = product(activation, q)
    step = float(scale.max() * q.scales.max() * 127)
    for got in (X @ w, jax.jit(lambda x, w: x @ w)(X, w)):
        # One activation may fall on the other side of a tie in float32.
        np.testing.assert_allclose(got, expected, atol=2 * step)
        assert np.isclose(got, expected, rtol=1e-4, atol=1e-4).mean() > 0.95


@pytest.mark.variants(2)
@pytest.mark.parametrize("activation", KINDS, ids=str)
def test_near_the_plain_product_and_compiled_to_integers(activation):
    w = product(activation, quantize(W, "int8"))
    plain = X @ W
    error = jnp.abs(X @ w - plain).max() / jnp.abs(plain).max()
    assert float(error) < 0.02
    text = str(jax.make_jaxpr(lambda x, w: x @ w)(X, w))
    assert "preferred_element_type=int32" in text
    assert "f32[64,24]" not in text  # no float copy of the weight


def test_integers_come_out_exactly():
    x = jax.random.randint(jax.random.key(0), (4, 64), -127, 128).at[:, 0].set(127)
    x = x.astype(jnp.float32)
    w = jax.random.randint(jax.random.key(1), (64, 8), -127, 128).at[0].set(127)
    w = w.astype(jnp.float32)
    np.testing.assert_allclose(x @ product(Activation(), quantize(w, "int8")), x @ w, rtol=1e-6)


def test_ranges_that_are_finer_lose_less():
    outliers = X.at[0, 0, 3].set(200.0)
    plain = outliers @ W

    def error(activation):
        got = outliers @ product(activation, quantize(W, "int8"), outliers)
        return float(jnp.square(got - plain).mean())

    shifted = X + 3.0
    assert error(Activation()) < 0.1 * error(Activation(share="tensor"))
    plain, outliers = shifted @ W, shifted
    assert error(Activation(offset="zero_point")) < error(Activation())


def test_activations_of_nothing():
    for activation in KINDS[:4]:
        numbers, scale, zero = quantize_activations(jnp.zeros((2, 8)), activation)
        shifted = numbers.astype(jnp.int32) - (jnp.int32(0) if zero is None else zero)
        assert not (scale * shifted.astype(jnp.float32)).any()


@functools.cache
def setting(preset):
    config = {"gpt2": gpt2_tiny, "llama": llama_tiny}[preset](scan_layers=True)

    @jax.jit
    def draw():
        leaves, structure = jax.tree.flatten(abstract_params(config))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        drawn = [0.3 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    return Transformer(config), draw(), jax.random.randint(jax.random.key(2), (2, 12), 0, 64)


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    ("preset", "activation"),
    [("gpt2", Activation("static", "tensor", "zero_point")), ("llama", Activation())],
)
def test_the_model_runs_unchanged(preset, activation):
    model, params, tokens = setting(preset)
    q = quantize_params(params, weight_rules(params, "int8"))
    ranges = activation_ranges(model, q, [tokens]) if activation.range == "static" else None
    integers = integer_products(q, activation, ranges=ranges)
    apply = jax.jit(lambda p: model.apply({"params": p}, tokens))
    got, expected = apply(integers), apply(q)
    assert 0 < float(jnp.abs(got - expected).max()) < 0.15 * float(jnp.abs(expected).max())
    text = str(jax.make_jaxpr(apply)(integers))
    products = text.count("preferred_element_type=int32")
    # Scores and values stay float: with the head, 7 and 8 products are integer ones.
    assert products == {"gpt2": 7, "llama": 8}[preset]


def test_bad_input():
    q = {"w": quantize(W, "int8")}
    cases = [
        (lambda: integer_products({"w": quantize(W, "q8_0")}), "none of the chosen"),
        (lambda: integer_products({"w": W}), "none of the chosen"),
        (lambda: integer_products(q, rules=[("v", True)]), "'v'"),
        (lambda: integer_products(q, Activation("static", "tensor")), "needs that of the input"),
        (lambda: Activation(range="fixed", share="tensor"), "range 'fixed' is unknown"),
        (lambda: jnp.ones((2, 24)) @ product(Activation(), q["w"]).T, "along the other axis"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert isinstance(product(Activation(), q["w"]), W8A8)
