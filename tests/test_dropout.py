"""Dropout's masks: their share, their independence, and that sharding draws the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from model.dropout import Dropout, dropped, kept

SHAPE = (64, 32, 48)


def masks(rate, count, shape=SHAPE):
    keys = jax.random.split(jax.random.key(7), count)
    return np.asarray(jax.vmap(lambda key: kept(Dropout(rate, key), shape))(keys))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept_is_that_of_independent_draws(rate, strict):
    found = masks(rate, 40).reshape(40, -1)
    n = found.shape[1]
    errors = (found.sum(1) - n * (1 - rate)) / np.sqrt(n * rate * (1 - rate))
    assert stats.kstest(errors, "norm").pvalue > 1e-3
    assert abs(errors.mean()) * np.sqrt(len(errors)) < 4


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbours_and_places_a_power_of_two_apart_are_independent(axis, strict):
    found = masks(0.5, 8) - 0.5
    for step in (1, 2, 4, 16):
        ahead = np.roll(found, step, axis + 1)
        correlation = 4 * (found * ahead).mean()
        assert abs(correlation) * np.sqrt(found.size) < 4.5


def test_keys_that_follow_each_other_draw_independent_masks(strict):
    folded = [jax.random.fold_in(jax.random.key(0), n) for n in range(12)]
    found = np.stack([kept(Dropout(0.5, key), SHAPE) for key in folded]).reshape(12, -1) - 0.5
    correlation = 4 * (found @ found.T) / found.shape[1]
    off = correlation[~np.eye(12, dtype=bool)]
    assert np.abs(off).max() * np.sqrt(found.shape[1]) < 4.5


def test_runs_of_eight_are_as_common_as_chance_has_them(strict):
    bits = masks(0.5, 4).reshape(-1, 8)
    counts = np.bincount(np.packbits(bits, axis=1)[:, 0], minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_the_mean_stays_and_the_gradient_is_the_mask(strict):
    x = jnp.linspace(1.0, 2.0, 4000)
    dropout = Dropout(0.25, jax.random.key(3))
    y, gradient = jax.value_and_grad(lambda x: dropped(x, dropout).sum())(x)
    mask = np.asarray(kept(dropout, x.shape))
    np.testing.assert_allclose(gradient, mask / 0.75, rtol=1e-6)
    assert float(y) == pytest.approx(float(x.sum()), rel=0.04)
    assert dropped(x, None) is x
    assert dropped(x.astype(jnp.bfloat16), dropout).dtype == jnp.bfloat16


def test_a_divided_array_draws_as_a_whole_one(strict):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jnp.ones((8, 6, 16))
    dropout = Dropout(0.3, jax.random.key(1))
    whole = jax.jit(lambda x: dropped(x, dropout))(x)
    for spec in (PartitionSpec("a", None, "b"), PartitionSpec(None, "b", "a")):
        apart = jax.jit(lambda x: dropped(x, dropout))(jax.device_put(x, NamedSharding(mesh, spec)))
        assert len(apart.sharding.device_set) == 8
        np.testing.assert_array_equal(apart, whole)


def test_arrays_without_axes_and_of_one_element_draw(strict):
    found = [bool(kept(Dropout(0.5, key), ())) for key in jax.random.split(jax.random.key(0), 64)]
    assert 16 < sum(found) < 48
