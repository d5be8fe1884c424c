"""Gradients at old parameters: fresh ones are plain, old ones those of a record kept by hand."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.presets import modern_tiny
from model.transformer import Transformer
from parallel.delayed import constant, delayed, uniform
from train.losses import cross_entropy
from train.plugs import Gradient, whole
from train.step import init_state, make_train_step


class OnlyKey(NamedTuple):
    rng: jax.Array | None


def loss(params, batch, context):
    """Not linear in the parameters, with a draw in it."""
    noise = 1 + 0.1 * jax.random.normal(context.rng, params["w"].shape)
    value = jnp.square(jnp.tanh(batch @ (params["w"] * noise))).sum()
    return value, {"loss": value}


def steps_of(plug, steps=7, rows=6, seed=0):
    """Gradients, parameters and batches of some steps of gradient descent."""
    draw = np.random.default_rng(0)
    batches = jnp.asarray(draw.normal(size=(steps, rows, 3)), jnp.float32)
    params = {"w": jnp.asarray(draw.normal(size=(3, 2)), jnp.float32)}
    carry, run = plug.init(params, {}), jax.jit(partial(plug.apply, loss))
    key, grads, trail = jax.random.key(seed), [], []
    for number in range(steps):
        trail.append(params)
        context = OnlyKey(jax.random.fold_in(key, number))
        grad, metrics, carry = run(params, batches[number], context, carry)
        grads.append(grad)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grad)
    return grads, trail, batches, key


@pytest.mark.variants(1)
@pytest.mark.parametrize("age", [0, 1, 3])
def test_a_constant_age_is_the_gradient_of_that_step(strict, age):
    grads, trail, batches, key = steps_of(delayed(constant(age)))
    for number, grad in enumerate(grads):
        old = trail[max(0, number - age)]
        context = OnlyKey(jax.random.fold_in(key, number))
        want, _ = jax.jit(partial(whole, loss))(old, batches[number], context)
        np.testing.assert_allclose(grad["w"], want["w"], rtol=1e-6)
    if age:
        fresh, _ = whole(loss, trail[-1], batches[-1], OnlyKey(jax.random.fold_in(key, 6)))
        assert np.abs(grads[-1]["w"] - fresh["w"]).max() > 1e-3


def test_workers_have_ages_of_their_own(strict):
    """Against the draws of the schedule, row by row."""
    bound, workers, seen = 3, 2, set()
    staleness = uniform(bound)
    drawn = []

    def draw(key, count):
        ages = staleness.draw(key, count)
        jax.debug.callback(lambda a: drawn.append(np.asarray(a)), ages, ordered=True)
        return ages

    plug = delayed(staleness._replace(draw=draw), workers)
    grads, trail, batches, key = steps_of(plug, steps=9)
    jax.effects_barrier()
    assert len(drawn) == 9
    for number, (grad, ages) in enumerate(zip(grads, drawn, strict=True)):
        seen |= {tuple(ages.tolist())}
        want = np.zeros((3, 2), np.float32)
        for w, age in enumerate(ages):
            rng = jax.random.fold_in(jax.random.fold_in(key, number), w)
            old = trail[number - min(int(age), number)]
            share, _ = whole(loss, old, batches[number][w::workers], OnlyKey(rng))
            want += share["w"]
        np.testing.assert_allclose(grad["w"], want, rtol=1e-5, atol=1e-6)
    assert len(seen) > 4
    assert any(a != b for a, b in seen)


def test_reproducible_from_the_seed():
    plug = delayed(uniform(3), workers=3)
    first, again, other = (steps_of(plug, seed=seed)[0][-1]["w"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


def test_metrics_are_those_of_all_workers():
    """With fresh parameters and no draws the workers' shares add up to the whole."""
    plain = lambda params, batch, context: (jnp.square(batch @ params).sum(), {"n": batch.sum()})
    batch, params = jnp.arange(12.0).reshape(6, 2), jnp.array([0.5, -1.0])
    plug, context = delayed(constant(0), workers=3), OnlyKey(jax.random.key(0))
    grads, metrics, _ = plug.apply(plain, params, batch, context, plug.init(params, {}))
    want, _ = whole(plain, params, batch, context)
    np.testing.assert_allclose(grads, want, rtol=1e-6)
    assert float(metrics["n"]) == 66.0


@pytest.mark.slow
def test_in_the_training_step():
    """Fresh gradients change nothing in training, old ones do, and resuming changes no bit."""
    model = Transformer(modern_tiny(layers=1, dropout=0.1))
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, 64, (4, 8)), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": jnp.ones((4, 8))}
    params = model.init(jax.random.key(0), tokens)["params"]
    optimizer = optax.adam(1e-2)

    def steps(gradient, count, state=None):
        if state is None:
            state = init_state(jax.random.key(0), params, optimizer, gradient=gradient)
        step = jax.jit(make_train_step(model, [cross_entropy()], optimizer, gradient=gradient))
        for _ in range(count):
            state, _ = step(state, {}, batch)
        return jax.device_get(state)

    plain = steps(whole, 4)
    fresh = steps(Gradient(*delayed(constant(0))), 4)
    # Two programs, in which the compiler fuses, and so rounds, sums as it likes.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, fresh.params, plain.params)
    gradient = Gradient(*delayed(uniform(2), workers=2))
    old = steps(gradient, 4)
    assert np.abs(old.params["head"]["kernel"] - plain.params["head"]["kernel"]).max() > 1e-4
    resumed = steps(gradient, 2, steps(gradient, 2))
    jax.tree.map(np.testing.assert_array_equal, resumed.params, old.params)


def test_fresh_is_plain_bit_for_bit():
    grads, trail, batches, key = steps_of(delayed(constant(0)), steps=3)
    for number, grad in enumerate(grads):
        context = OnlyKey(jax.random.fold_in(key, number))
        want, _ = jax.jit(partial(whole, loss))(trail[number], batches[number], context)
        np.testing.assert_array_equal(grad["w"], want["w"])


def test_errors():
    plug = delayed(constant(1), workers=4)
    params = {"w": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="6 rows does not divide over 4 workers"):
        plug.apply(loss, params, jnp.ones((6, 3)), OnlyKey(jax.random.key(0)), plug.init(params, 0))
    with pytest.raises(ValueError, match="give the step's key"):
        plug.apply(loss, params, jnp.ones((8, 3)), OnlyKey(None), plug.init(params, 0))
    with pytest.raises(ValueError, match="staleness of -1 steps"):
        uniform(-1)
    with pytest.raises(ValueError, match="0 workers"):
        delayed(constant(1), workers=0)
