"""Optimizers that meet no gradient for a while, or one that fades."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_matrix_optimizers import gradients, run
from train.optimizers.kron import scale_by_kron
from train.optimizers.scion import Scion
from train.optimizers.shampoo import scale_by_shampoo
from train.optimizers.table import build
from train.schedules import Constant


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(8, 8), (24, 6)])
def test_kron_begins_after_many_updates_without_a_gradient(size, shape):
    """As of a layer that thaws: its factors have stayed as they were."""
    tx = scale_by_kron()
    update = jax.jit(tx.update)
    zero = jnp.zeros(shape)
    state = tx.init(zero)
    for _ in range(300):
        found, state = update(zero, state)
        assert not found.any()
    np.testing.assert_array_equal(state.left, np.eye(shape[0]))
    for grad in gradients(6, shape):
        found, state = update(size * jnp.asarray(grad, jnp.float32), state)
        assert 1e-4 < float(jnp.sqrt(jnp.square(found).mean())) < 2


@pytest.mark.parametrize("graft", ["none", "adam"])
def test_shampoo_begins_after_an_update_without_a_gradient(graft):
    """As of a factor of low rank beside one that is zero, or below a projection that is."""
    tx = scale_by_shampoo(graft=graft, frequency=3)
    grads = 0.01 * gradients()
    grads[0] = 0.0
    found = run(tx, grads)
    assert not found[0].any()
    assert 0 < np.abs(found[1:]).max() < 20


def test_scion_of_a_momentum_that_fades():
    """Squares of what is left underflow long before it does; the direction stays a unit vector."""
    kernel = {"kernel": jnp.ones((4, 4))}
    params = {
        "blocks": {"up": {"kernel": jnp.ones((1, 4, 4))}},
        "head": {**kernel, "b": jnp.ones(4)},
    }
    tx = build(Scion(learning_rate=1.0), Constant(), 2000, params)
    state, update = tx.init(params), jax.jit(tx.update)
    for n in range(600):
        grad = jax.tree.map(lambda w, g=0.0 if n else 0.01: jnp.full_like(w, g), params)
        found, state = update(grad, state, params)
        assert float(jnp.abs(found["head"]["b"]).max()) < 51  # radius 50, rate 1
