"""Fake quantization: the export grid bit for bit, straight-through gradients, and training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress.quantization.fake import fake_quantization, fake_quantize
from compress.quantization.formats import FORMATS
from compress.quantization.quantize import quantize_params, weight_rules
from compress.quantization.rounding import quantize
from model.presets import gpt2_tiny
from model.transformer import Transformer
from train.losses import cross_entropy
from train.plugs import WeightTransform
from train.step import init_state, make_evaluation_step, make_train_step

W = jax.random.normal(jax.random.key(0), (2, 64, 6))


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"int4_g128"}))
def test_forward_is_the_export_grid_bit_for_bit(strict, name):
    """Eagerly and inside a compiled function that goes on with the result."""
    expected = quantize(W, name).dequantize()
    np.testing.assert_array_equal(fake_quantize(W, name), expected)
    compiled, _ = jax.jit(lambda w: (fake_quantize(w, name), fake_quantize(w, name).sum()))(W)
    np.testing.assert_array_equal(compiled, expected)


def test_forward_with_searched_scales(strict):
    expected = quantize(W, "q4_0", candidates=5).dequantize()
    np.testing.assert_array_equal(fake_quantize(W, "q4_0", candidates=5), expected)


@pytest.mark.parametrize("name", ["int4", "q4_1", "e4m3"])
def test_the_gradient_is_that_of_the_identity(strict, name):
    target = jax.random.normal(jax.random.key(1), W.shape)
    got = jax.grad(lambda w: (target * fake_quantize(w, name)).sum())(W)
    np.testing.assert_array_equal(got, target)
    _, tangent = jax.jvp(lambda w: fake_quantize(w, name), (W,), (target,))
    np.testing.assert_array_equal(tangent, target)


def test_a_clipped_gradient_stops_at_the_ends(strict):
    settings = {"candidates": 8, "gradient": "clipped"}
    got = jax.grad(lambda w: fake_quantize(w, "int3", **settings).sum())(W)
    q = quantize(W, "int3", candidates=8)
    steps = np.asarray(W) / np.asarray(q.scales)
    outside = (steps > 3.5) | (steps < -4.5)
    assert outside.any()
    np.testing.assert_array_equal(got, np.where(outside, 0.0, 1.0))


def test_a_gradient_is_clipped_by_the_grid_not_by_the_type():
    """Within the grid every weight of bfloat16 learns."""
    w = jax.random.normal(jax.random.key(3), (256, 64), jnp.bfloat16)
    got = jax.grad(lambda w: fake_quantize(w, "int8", gradient="clipped").astype("float32").sum())(
        w
    )
    np.testing.assert_array_equal(np.asarray(got, np.float32), 1.0)


def test_training_lowers_the_loss_and_exports_what_was_trained():
    model = Transformer(gpt2_tiny(dropout=0.0, scan_layers=True))
    tokens = jnp.tile(jnp.arange(16) % 5, (4, 1))
    batch = {
        "tokens": tokens,
        "targets": (tokens + 1) % 5,
        "weights": jnp.ones(tokens.shape),
    }
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    rules = weight_rules(params, "q4_0")
    transform = WeightTransform("fake_quantization", fake_quantization(rules))
    optimizer = optax.adam(1e-2)
    terms = [cross_entropy()]
    step = jax.jit(make_train_step(model, terms, optimizer, transforms=[transform]))
    state = init_state(jax.random.key(0), params, optimizer, [transform])
    losses = []
    for _ in range(20):
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]

    faked = jax.jit(make_evaluation_step(model, terms, [transform]))(state, {}, batch)
    real = state.replace(params=quantize_params(state.params, rules))
    real = jax.jit(make_evaluation_step(model, terms))(real, {}, batch)
    one, two = (out["cross_entropy"]["total"] for out in (faked, real))
    np.testing.assert_allclose(one, two, rtol=1e-5)
    dense = jax.jit(make_evaluation_step(model, terms))(state, {}, batch)
    assert abs(float(dense["cross_entropy"]["total"] / one) - 1) > 1e-4


def test_bad_input():
    params = {"head": {"kernel": jnp.ones((32, 2))}}
    cases = [
        (lambda: fake_quantization([("heads", "int8")])(params, None), "'heads'"),
        (lambda: fake_quantize(W, "int8", gradient="none"), "'identity' or 'clipped'"),
        (lambda: fake_quantize(W, "e4m3", gradient="clipped"), "for integer formats"),
        (lambda: fake_quantize(W, "int4_g128"), "do not divide"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
