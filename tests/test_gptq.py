"""GPTQ: against a slow formula of its own, and against rounding to nearest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.calibrate import sequential
from compress.quantization.formats import format_of
from compress.quantization.gptq import BLOCK, gptq, gptq_params, inverse_factor
from compress.quantization.quantize import dequantize_params, is_qtensor, quantize_params, report
from compress.quantization.rounding import quantize
from model.flops import abstract_params
from model.presets import gpt2_tiny, llama_tiny
from model.transformer import Transformer

IN, OUT = 64, 5


def inputs(size=IN, seed=0, rows=400):
    """Correlated, and of very different sizes."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, size)) @ draw.normal(size=(size, size))
    return (x * np.exp(draw.normal(size=size))).astype(np.float32)


def weight(size=IN, seed=0):
    return jax.random.normal(jax.random.key(seed), (size, OUT))


def loss(w, q, hessian):
    d = np.asarray(w - q.dequantize(), np.float64)
    return float(np.sum(d * (np.asarray(hessian, np.float64) @ d)))


def by_elimination(w, hessian, q, order, damping):
    """Optimal brain quantization in a given order, one row and one elimination at a time."""
    w, H = np.asarray(w, np.float64).copy(), np.asarray(hessian, np.float64)
    inverse = np.linalg.inv(H + damping * np.mean(np.diag(H)) * np.eye(len(H)))
    scales = np.repeat(np.asarray(q.scales, np.float64), len(w) // q.scales.shape[0], axis=0)
    shifts = np.zeros_like(scales)
    if q.offsets is not None:
        shifts = np.repeat(np.asarray(q.offsets, np.float64), len(w) // q.offsets.shape[0], axis=0)
    format = q.format
    result = np.zeros_like(w)
    turn = np.argsort(-np.diag(H), kind="stable") if order == "activation" else range(len(w))
    for i in turn:
        if format.offset == "zero_point":
            number = np.clip(np.round(w[i] / scales[i]) + shifts[i], format.low, format.high)
            result[i] = (number - shifts[i]) * scales[i]
        else:
            number = np.clip(np.round((w[i] - shifts[i]) / scales[i]), format.low, format.high)
            result[i] = number * scales[i] + shifts[i]
        error = (w[i] - result[i]) / inverse[i, i]
        w -= inverse[:, i : i + 1] * error
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        w[i] = result[i]
    return result


@pytest.mark.parametrize(
    ("name", "order"),
    [("int4", "given"), ("q4_1", "activation"), ("int8_zero_point", "activation")],
)
def test_against_elimination_row_by_row(strict, name, order):
    size = 160
    assert size % BLOCK  # several blocks, and the last one padded
    x, w = inputs(size, rows=1000), weight(size)
    q = gptq(w, jnp.asarray(x.T @ x), name, order=order)
    expected = by_elimination(w, x.T @ x, quantize(w, name), order, 0.01)
    got = np.asarray(q.dequantize())
    # A weight beside a tie may fall on the other side in float32, and takes others with it.
    assert np.isclose(got, expected, atol=1e-5).mean() > 0.97
    np.testing.assert_array_equal(q.scales, quantize(w, name).scales)


@pytest.mark.variants(1)
@pytest.mark.parametrize("name", ["int3", "q4_0", "e4m3"])
def test_beats_rounding_on_correlated_inputs(name):
    format = format_of(name)
    for seed in range(2):
        x, w = inputs(seed=seed), weight(seed=seed)
        hessian = jnp.asarray(x.T @ x)
        nearest = loss(w, quantize(w, format), hessian)
        for order in ("activation", "given"):
            most = {"activation": 0.7, "given": 0.85}[order]
            assert loss(w, gptq(w, hessian, format, order=order), hessian) < most * nearest


@pytest.mark.variants(1)
@pytest.mark.parametrize("name", ["int8_zero_point", "q4_1", "e5m2"])
def test_is_rounding_where_inputs_are_independent(name):
    w = weight()
    got = gptq(w, 7.0 * jnp.eye(IN), name)
    np.testing.assert_array_equal(got.dequantize(), quantize(w, name).dequantize())
    scaled = gptq(w, jnp.diag(jnp.arange(1.0, IN + 1)), name)
    np.testing.assert_array_equal(scaled.dequantize(), quantize(w, name).dequantize())


def test_tables_and_inputs_that_are_never_there():
    x, w = inputs(), weight()
    x[:, 3:9] = 0
    hessian = jnp.asarray(x.T @ x)
    kernel = gptq(w, hessian, "q4_0")
    table = gptq(w.T, hessian, "q4_0", -1)
    np.testing.assert_array_equal(table.T.dequantize(), kernel.dequantize())
    nearest = quantize(w, "q4_0").dequantize()
    np.testing.assert_array_equal(kernel.dequantize()[3:9], nearest[3:9])


def test_inverse_factor():
    x = inputs()
    H = x.T @ x
    U = np.asarray(inverse_factor(jnp.asarray(H), 0.01), np.float64)
    assert not np.tril(U, -1).any()
    damped = H.astype(np.float64) + 0.01 * np.mean(np.diag(H)) * np.eye(IN)
    np.testing.assert_allclose(U.T @ U @ damped, np.eye(IN), atol=5e-3)


def test_one_scan_whatever_the_size():
    """The program does not grow with the kernel, so that it compiles as fast for 3,072 inputs."""

    def equations(size):
        w = jnp.zeros((size, 8))
        jaxpr = jax.make_jaxpr(lambda w, h: gptq(w, h, "q4_0"))(w, jnp.eye(size))
        return str(jaxpr).count(" = ")

    assert equations(3072) == equations(768)


# The whole model


def draw(config):
    leaves, structure = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.3 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


@functools.cache
def setting(preset):
    config = {"gpt2": gpt2_tiny, "llama": llama_tiny}[preset](scan_layers=True)
    tokens = np.random.default_rng(0).integers(0, 64, (12, 24))
    return Transformer(config), jax.jit(draw, static_argnums=0)(config), tokens


def divergence(model, params, other, tokens):
    """Mean KL of the other's predictions from the model's."""
    apply = jax.jit(lambda p, t: jax.nn.log_softmax(model.apply({"params": p}, t)))
    one, two = (apply(p, jnp.asarray(tokens)) for p in (params, other))
    return float((jnp.exp(one) * (one - two)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "head"),
    [("gpt2", "nearest"), pytest.param("llama", "gptq", marks=pytest.mark.slow)],
)
def test_the_model_is_nearer_than_by_rounding(preset, head):
    model, params, tokens = setting(preset)
    rules = [("position_embedding|token_embedding", "int8"), ("kernel", "int3")]
    rules = rules if preset == "gpt2" else [("token_embedding", "int8"), ("kernel", "int3")]
    q = gptq_params(model, params, [tokens[:8]], rules, head=head)
    nearest = quantize_params(params, rules)
    assert jax.tree.structure(q) == jax.tree.structure(nearest)
    assert report(q).bytes == report(nearest).bytes
    far = divergence(model, params, nearest, tokens[8:])
    assert divergence(model, params, q, tokens[8:]) < 0.8 * far


def test_a_tied_head_by_gptq():
    model, params, tokens = setting("gpt2")
    rules = [("token_embedding", "int3")]
    q, nearest = (
        gptq_params(model, params, [tokens], rules, head=head) for head in ("gptq", "nearest")
    )
    assert is_qtensor(q["token_embedding"]["embedding"])
    x = jax.jit(lambda p, t: model.apply({"params": p}, t, method="features").final)
    x = x(params, jnp.asarray(tokens)).reshape(-1, 32)
    table = params["token_embedding"]["embedding"]

    def error(p):
        return float(
            jnp.square(x @ (table - p["token_embedding"]["embedding"].dequantize()).T).sum()
        )

    assert error(q) < error(nearest)
    assert not any(is_qtensor(a) for a in jax.tree.leaves(q["blocks"], is_leaf=is_qtensor))


def test_layers_see_quantized_layers():
    """Layer 1 is fitted to the inputs that the quantized layer 0 gives, not the plain one."""
    model, params, tokens = setting("gpt2")
    q = gptq_params(model, params, [tokens], [("kernel", "int3")])
    real = dequantize_params(q)["blocks"]
    mixed = jax.tree.map(lambda a, b: a.at[0].set(b[0]), params["blocks"], real)
    half = {**params, "blocks": mixed}
    kernel = params["blocks"]["attention"]["q"]["kernel"][1]

    def agreement(params):
        seen = []
        sequential(
            model, params, [tokens], ("hessian",), lambda n, layer, s: (seen.append(s), layer)[1]
        )
        expected = gptq(kernel, seen[1]["attention/q/kernel"]["hessian"], "int3").dequantize()
        return float(jnp.isclose(expected, real["attention"]["q"]["kernel"][1]).mean())

    assert agreement(half) > 0.97
    assert agreement(params) < 0.95


def test_bad_input():
    w, H = weight(), jnp.eye(IN)
    model, params, tokens = setting("gpt2")
    cases = [
        (lambda: gptq(w, jnp.eye(3), "int4"), r"needs a Hessian of 64 inputs, not of shape \(3, 3"),
        (lambda: gptq(w, jnp.zeros((IN, IN)), "int4"), "not positive definite"),
        (lambda: gptq(w, -H, "int4"), "not positive definite"),
        (lambda: gptq(w.at[0, 0].set(jnp.nan), H, "int4"), "weight .* holds NaN"),
        (lambda: gptq(w, H * jnp.inf, "int4"), "Hessian .* holds NaN"),
        (lambda: gptq(w, H, "int4", order="random"), "'activation' or 'given'"),
        (lambda: gptq(w, H, "int4_g128"), "do not divide"),
        (
            lambda: gptq_params(model, params, [tokens], [("kernel", "int4")], head="rtn"),
            "'nearest' or 'gptq'",
        ),
        (lambda: gptq_params(model, params, [tokens], [("kernels", "int4")]), "'kernels'"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
