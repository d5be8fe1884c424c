"""Sparsity schedules against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.pruning.schedules import Rewiring, cubic, fixed, iterative, one_shot


def run(schedule, steps, final):
    step = jnp.arange(steps, dtype=jnp.int32)
    sparsity = jax.jit(jax.vmap(lambda t: schedule.sparsity(t, jnp.float32(final))))(step)
    return np.asarray(jax.vmap(schedule.due)(step)), np.asarray(sparsity)


def test_one_shot(strict):
    due, sparsity = run(one_shot(3), 6, 0.5)
    assert due.tolist() == [False] * 3 + [True] + [False] * 2
    assert sparsity.tolist() == [0, 0, 0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("initial", [0.0, 0.2])
def test_cubic_is_the_formula(strict, initial):
    start, every, times, final = 5, 3, 7, 0.9
    due, sparsity = run(cubic(start, every, times, initial), 40, final)
    for t in range(40):
        last = start + every * times
        assert due[t] == (t in range(start, last + 1, every))
        at = min(start + (t - start) // every * every, last)
        value = final + (initial - final) * (1 - (at - start) / (every * times)) ** 3
        assert abs(sparsity[t] - (value if t >= start else 0)) < 1e-6
    assert sparsity[last] == np.float32(final)
    assert last == cubic(start, every, times).last


def test_cubic_never_prunes_more_than_the_final_sparsity(strict):
    """A parameter with a final sparsity below the initial one."""
    _, sparsity = run(cubic(0, 2, 3, 0.5), 10, 0.3)
    np.testing.assert_allclose(sparsity, 0.3, rtol=1e-6)


def test_iterative_takes_the_same_share_each_round(strict):
    due, sparsity = run(iterative(4, 5, 3), 20, 0.875)
    assert np.flatnonzero(due).tolist() == [4, 9, 14]
    assert iterative(4, 5, 3).last == 14
    np.testing.assert_allclose(sparsity[[3, 4, 8, 9, 14, 19]], [0, 0.5, 0.5, 0.75, 0.875, 0.875])


def test_sparsities_of_layers_go_at_once(strict):
    final = jnp.array([0.0, 0.5, 0.9])
    for schedule in (one_shot(0), cubic(0, 1, 4), iterative(0, 1, 4)):
        got = schedule.sparsity(jnp.int32(schedule.last), final)
        np.testing.assert_array_equal(got, final)
        assert got.dtype == jnp.float32


def test_rewiring_falls_by_half_a_cosine(strict):
    rewiring = Rewiring(every=10, until=40, share=0.4)
    step = jnp.arange(60, dtype=jnp.int32)
    assert np.flatnonzero(jax.vmap(rewiring.due)(step)).tolist() == [10, 20, 30]
    expected = 0.2 * (1 + np.cos(np.pi * np.arange(60) / 40))
    np.testing.assert_allclose(jax.vmap(rewiring.fraction)(step), expected, atol=1e-6)
    assert not jax.vmap(fixed().due)(step).any()


def test_bad_input_is_explained():
    for bad in (
        lambda: one_shot(-1),
        lambda: cubic(0, 0, 3),
        lambda: cubic(0, 1, 0),
        lambda: iterative(0, 1, 0),
        lambda: Rewiring(every=0),
    ):
        with pytest.raises(ValueError, match="must be at least"):
            bad()
    with pytest.raises(ValueError, match="share of zeros"):
        cubic(0, 1, 1, initial=1.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Rewiring(share=1.5)
