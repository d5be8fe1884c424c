"""8-bit products in training: within what the grid allows of float ones, and they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.quantization.int8_training import (
    LowPrecision,
    Products,
    dot,
    low_precision_products,
    round_to,
)
from compress.quantization.quantize import quantize_params
from model.presets import gpt2_tiny, llama_tiny
from model.transformer import Transformer
from train.plugs import Context, WeightTransform

X = jax.random.normal(jax.random.key(0), (3, 5, 24)) * 2
W = jax.random.normal(jax.random.key(1), (24, 10)) * 0.3
G = jax.random.normal(jax.random.key(2), (3, 5, 10))
EVERY = Products(weight_gradient="int8")


def rows(a):
    return np.asarray(a, np.float64).reshape(-1, a.shape[-1])


def bound(a, b):
    """Of |q(a) q(b) - a b| for a [N, K] by row and b [K, M] by column, half a step each."""
    step_a = np.abs(a).max(1, keepdims=True) / 127 / 2
    step_b = np.abs(b).max(0, keepdims=True) / 127 / 2
    spread = step_a * np.abs(b).sum(0, keepdims=True) + np.abs(a).sum(1, keepdims=True) * step_b
    return spread + len(b) * step_a * step_b + 1e-5


def all_three(products, key=None, x=X, w=W):
    y, back = jax.vjp(lambda x, w: dot(x, w, key, products), x, w)
    return (y, *back(G.astype(y.dtype)))


def test_products_are_within_the_grid_of_float_ones(strict):
    y, dx, dw = (rows(a) for a in all_three(EVERY))
    x, w, g = rows(X), rows(W), rows(G)
    for got, a, b in ((y, x, w), (dx, g, w.T), (dw, x.T, g)):
        error = np.abs(got - a @ b)
        assert (error <= bound(a, b)).all()
        assert error.max() > 1e-4  # it is no float product
    default = all_three(Products())
    np.testing.assert_allclose(rows(default[2]), x.T @ g, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(default[1], all_three(EVERY)[1])
    plain = all_three(Products("float", "float", "float"))
    for got, a, b in zip(plain, (x, g, x.T), (w, w.T, g), strict=True):
        np.testing.assert_allclose(rows(got), a @ b, rtol=1e-4, atol=1e-4)


def test_forward_by_integers_of_numpy():
    x, w = rows(X), rows(W)
    sx, sw = np.abs(x).max(1, keepdims=True) / 127, np.abs(w).max(0, keepdims=True) / 127
    integers = np.round(x / sx).astype(int) @ np.round(w / sw).astype(int)
    np.testing.assert_allclose(rows(dot(X, W)), integers * sx * sw, rtol=1e-5, atol=1e-5)


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    ("products", "count"), [(Products(), 2), (EVERY, 3), (Products("float", "int8"), 1)]
)
def test_dots_are_of_integers(products, count):
    text = str(jax.make_jaxpr(lambda x, w: all_three(products, None, x, w))(X, W))
    assert text.count("preferred_element_type=int32") == count
    assert text.count("preferred_element_type=float32") == 3 - count


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_float8(strict, kind):
    y, dx, dw = all_three(Products(kind, "e5m2", "e5m2"))
    relative = {"e4m3": 2**-4, "e5m2": 2**-3}[kind]  # half a step of the mantissa
    x, w, g = rows(X), rows(W), rows(G)
    for got, a, b, r in ((y, x, w, relative), (dx, g, w.T, 2**-3), (dw, x.T, g, 2**-3)):
        allowed = (2 * r + r * r) * (np.abs(a) @ np.abs(b)) + 1e-3
        assert (np.abs(rows(got) - a @ b) <= allowed).all()
        assert np.abs(rows(got) - a @ b).max() > 1e-3


@pytest.mark.parametrize("form", ["plain", "cpu"])
def test_bfloat16_products_are_those_of_rounded_operands(strict, monkeypatch, form):
    """Its three products in float64, of operands that were rounded by NumPy's own type."""
    monkeypatch.setattr("model.linear.cpu_forms", lambda platform=None: form == "cpu")
    y, dx, dw = all_three(Products("bfloat16", "bfloat16", "bfloat16"))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32,) * 3
    x, w, g = (rows(np.asarray(a).astype(jnp.bfloat16)) for a in (X, W, G))
    for got, a, b in ((y, x, w), (dx, g, w.T), (dw, x.T, g)):
        np.testing.assert_allclose(rows(got), a @ b, rtol=1e-5, atol=1e-5)
    assert np.abs(rows(y) - rows(X) @ rows(W)).max() > 1e-3  # it is no float32 product


def test_stochastic_rounding_has_no_bias():
    keys = jax.random.split(jax.random.key(3), 3000)
    a = jnp.array([[0.3, -0.7, 1.0], [0.0, 2.0, -1.111]])

    def once(key):
        numbers, scale = round_to("int8", a, 1, key)
        return numbers.astype(jnp.float32) * scale

    many = np.asarray(jax.vmap(once)(keys), np.float64)
    error = np.abs(many.mean(0) - np.asarray(a))
    assert (error <= 5 * many.std(0) / np.sqrt(len(keys)) + 1e-6).all()
    products = Products(weight_gradient="int8", rounding="stochastic")
    _, dx, dw = jax.jit(jax.vmap(lambda key: all_three(products, key)))(keys)
    for got, exact in ((dx, rows(G) @ rows(W).T), (dw, rows(X).T @ rows(G))):
        many = np.asarray(got, np.float64).reshape(len(keys), *exact.shape)
        z = (many.mean(0) - exact) / (many.std(0) / np.sqrt(len(keys)) + 1e-7)
        assert np.abs(z).max() < 5.5
        assert 0.8 < z.std() < 1.2
    nearest = rows(all_three(EVERY)[1])
    assert (
        np.abs(nearest - rows(G) @ rows(W).T).mean()
        > 5
        * np.abs(
            np.asarray(dx, np.float64).mean(0).reshape(nearest.shape) - rows(G) @ rows(W).T
        ).mean()
    )


def test_operands_are_rounded_apart():
    """Two equal operands, all at half a step: one draw for both would double their product."""
    g = w = jnp.full((1, 1000), 0.5).at[0, 0].set(127.0)
    products = Products(rounding="stochastic")

    def input_gradient(key):
        return jax.vjp(lambda x: dot(x, w, key, products), jnp.ones((1, 1)))[1](g)[0][0, 0]

    drawn = jax.vmap(input_gradient)(jax.random.split(jax.random.key(0), 64)) - 127.0**2
    assert abs(float(drawn.mean()) - 999 / 4) < 25  # 14 is the deviation of one draw


def test_zeros_types_and_vectors(strict):
    assert not any(
        a.any() for a in all_three(EVERY, None, jnp.zeros_like(X), jnp.zeros_like(W))[:2]
    )
    y, dx, dw = all_three(EVERY, None, X.astype(jnp.bfloat16))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(dot(X[0, 0], W), dot(X, W)[0, 0], rtol=1e-6)


# As a weight transform


def context(rng=None):
    return Context(jnp.int32(0), rng, {}, {}, {})


def test_it_is_a_weight_like_any_other(strict):
    stack = jnp.stack([W, W + 1])
    keys = jax.random.split(jax.random.key(0))
    w = LowPrecision(stack, keys, Products(rounding="stochastic"))
    assert (w.shape, w.ndim, w.dtype) == ((2, 24, 10), 3, jnp.float32)
    _, ys = jax.lax.scan(lambda c, w: (c, X @ w), 0, w)
    np.testing.assert_allclose(ys[1], dot(X, W + 1), rtol=1e-5)
    one = jax.tree.map(lambda a: a[0], w)
    np.testing.assert_allclose(G @ one.T, dot(G, W.T), rtol=1e-5)
    np.testing.assert_array_equal(one.take(jnp.array([3])), W[3:4])
    np.testing.assert_array_equal(one.dequantize(), W)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 17)), jnp.int32)
RULES = [("blocks/.*/kernel", Products(rounding="stochastic"))]


@pytest.mark.variants(1)
@pytest.mark.parametrize("preset", [gpt2_tiny, llama_tiny])
def test_twenty_steps_lower_the_loss(preset):
    model = Transformer(preset(scan_layers=True))
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    transform = WeightTransform("int8", low_precision_products(RULES))

    def loss(params, rng):
        weights = transform.apply(params, context(rng))
        picked = jax.nn.log_softmax(model.apply({"params": weights}, TOKENS[:, :-1]))
        return -jnp.take_along_axis(picked, TOKENS[:, 1:, None], -1).mean()

    @jax.jit
    def step(params, rng):
        value, grads = jax.value_and_grad(loss)(params, rng)
        return jax.tree.map(lambda w, g: w - 0.5 * g, params, grads), value

    values = []
    for number in range(20):
        params, value = step(params, jax.random.fold_in(jax.random.key(5), number))
        values.append(float(value))
    assert values[-1] < values[0] - 0.3
    assert np.isfinite(values).all()


def test_rules_and_keys():
    model = Transformer(gpt2_tiny(scan_layers=True))
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    apply = low_precision_products([("mlp/up/kernel", None), *RULES])
    weights = apply(params, context(jax.random.key(0)))
    blocks = weights["blocks"]
    assert isinstance(blocks["mlp"]["up"]["kernel"], jax.Array)
    q, k = blocks["attention"]["q"]["kernel"], blocks["attention"]["k"]["kernel"]
    drawn = jax.random.key_data(jnp.stack([q.key, k.key])).reshape(4, -1)
    assert len(np.unique(drawn, axis=0)) == 4  # by kernel and by layer
    assert apply(params, context())["blocks"]["attention"]["q"]["kernel"].key is None
    quiet = model.apply({"params": apply(params, context())}, TOKENS)
    np.testing.assert_allclose(quiet, model.apply({"params": params}, TOKENS), atol=0.05)
    assert (quiet != model.apply({"params": params}, TOKENS)).any()


def test_a_sum_that_int32_cannot_hold_is_refused():
    most = (2**31 - 1) // 127**2
    assert most * 127**2 < 2**31 <= (most + 1) * 127**2

    def trained(rows, products):
        x, g = (jax.ShapeDtypeStruct((rows, 2), jnp.float32) for _ in range(2))
        w = jnp.ones((2, 2))
        return jax.eval_shape(
            lambda x, g: jax.vjp(lambda w: dot(x, w, None, products), w)[1](g), x, g
        )

    trained(most, EVERY)
    trained(most + 1, Products())  # the weight's gradient in float
    with pytest.raises(ValueError, match=r"133,145 products of int8 .* int32 holds 133,144"):
        trained(most + 1, EVERY)


def test_bad_input():
    params = {"up": {"kernel": W, "bias": jnp.ones(10)}}
    quantized = quantize_params(params, [("kernel", "int8")])
    cases = [
        (lambda: Products("int4"), "not 'int4'"),
        (lambda: Products(rounding="up"), "'nearest' or 'stochastic'"),
        (lambda: dot(X, W.T), "does not fit the shapes"),
        (lambda: low_precision_products([("kernels", EVERY)])(params, context()), "'kernels'"),
        (lambda: low_precision_products([("kernel", None)])(params, context()), "choose no kernel"),
        (lambda: low_precision_products([("bias", EVERY)])(params, context()), "no plain matrix"),
        (
            lambda: low_precision_products([("kernel", EVERY)])(quantized, context()),
            "no plain matrix",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
