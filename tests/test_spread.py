"""Shared work equals work done alone, whatever the number of rows; each device does its part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.mesh import make_mesh
from parallel.spread import spread


def values(matrices, shifts):
    return jnp.linalg.eigvalsh(matrices) + shifts[:, None]


@pytest.mark.parametrize("rows", [1, 8, 11])
def test_shared_out_over_eight_devices(strict, rows):
    seen = []

    def fn(matrices, shifts):
        seen.append(matrices.shape[0])
        return values(matrices, shifts)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 3, 3)), jnp.float32)
    x, shifts = x + x.mT, jnp.arange(rows, dtype=jnp.float32)
    with jax.set_mesh(make_mesh(data=2, tensor=4)):
        got = jax.jit(lambda x, s: spread(fn, x, s))(x, shifts)
    assert set(seen) == {-(-rows // 8)}
    assert got.sharding.is_fully_replicated
    np.testing.assert_allclose(got, values(x, shifts), rtol=1e-4, atol=1e-5)


def test_without_a_mesh_it_is_the_function():
    x = jnp.ones((3, 2, 2))
    np.testing.assert_array_equal(spread(values, x, jnp.zeros(3)), values(x, jnp.zeros(3)))
