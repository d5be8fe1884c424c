"""Schedules: where the peak is, that no update is wasted, and the published formulas."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    InverseSqrt,
    InverseTime,
    Linear,
    WarmupStableDecay,
    schedule_named,
)

PEAK, TOTAL, WARMUP = 0.3, 50, 7
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def values(schedule, steps):
    return np.array([float(schedule(int(step))) for step in steps])


@every_schedule
@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
def test_every_update_has_a_positive_rate_and_the_peak_is_reached(name, warmup):
    settings = dataclasses.replace(SCHEDULES[name](), warmup_steps=warmup)
    rates = values(settings.build(PEAK, TOTAL), range(TOTAL))
    assert rates.min() > 0
    assert rates.max() == np.float32(PEAK)
    assert rates.argmax() == warmup  # the first of the largest


@every_schedule
def test_warmup_rises_by_equal_steps_and_never_after_it(name):
    settings = dataclasses.replace(SCHEDULES[name](), warmup_steps=WARMUP)
    rates = values(settings.build(PEAK, TOTAL), range(TOTAL))
    np.testing.assert_allclose(
        rates[: WARMUP + 1], PEAK * np.arange(1, WARMUP + 2) / (WARMUP + 1), rtol=1e-6
    )
    assert (np.diff(rates[WARMUP:]) <= 0).all()


@pytest.mark.parametrize("name", ["constant", "inverse_sqrt", "inverse_time"])
def test_what_does_not_end_with_the_run_is_the_same_curve_after_a_warmup(name):
    extra = {"timescale": 5} if name == "inverse_sqrt" else {}
    plain = SCHEDULES[name](**extra).build(PEAK, TOTAL)
    warmed = SCHEDULES[name](warmup_steps=WARMUP, **extra).build(PEAK, TOTAL)
    np.testing.assert_allclose(
        values(warmed, range(WARMUP, TOTAL)), values(plain, range(TOTAL - WARMUP)), rtol=1e-6
    )


@every_schedule
def test_traced_steps_give_the_same_float32(name, strict):
    settings = dataclasses.replace(SCHEDULES[name](), warmup_steps=WARMUP)
    schedule = settings.build(PEAK, TOTAL)
    steps = jnp.arange(TOTAL + 20)
    traced = jax.jit(jax.vmap(schedule))(steps)
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, values(schedule, steps), rtol=1e-5, atol=1e-8)
    assert schedule(3).dtype == jnp.float32


@pytest.mark.parametrize("settings", [InverseSqrt(7, timescale=2), InverseTime(7, decay=0.25)])
def test_a_warmup_is_free_of_nans_from_the_curve_that_follows(settings):
    """Both sides of the boundary are evaluated, and these have poles before it."""
    schedule = settings.build(PEAK, TOTAL)
    with jax.debug_nans(True), jax.debug_infs(True):
        values(schedule, range(10))


@pytest.mark.parametrize("name", ["linear", "cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_decays_end_at_the_final_fraction_and_stay(name, final):
    settings = SCHEDULES[name](warmup_steps=3, final_fraction=final)
    rates = values(settings.build(PEAK, TOTAL), [TOTAL - 1, TOTAL, TOTAL + 1, 10 * TOTAL])
    np.testing.assert_allclose(rates[1:], final * PEAK, atol=1e-8)
    if final < 1:
        assert rates[0] > rates[1]


def test_formulas():
    steps = np.arange(TOTAL + 1)
    after = np.maximum(steps - WARMUP, 0)
    progress = after / (TOTAL - WARMUP)
    cosine = PEAK * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress)))
    expected = {
        Constant(WARMUP): np.full(TOTAL + 1, PEAK),
        Linear(WARMUP, 0.1): PEAK * (1 - 0.9 * progress),
        Cosine(WARMUP, 0.1): cosine,
        InverseTime(WARMUP, decay=0.2): PEAK / (1 + 0.2 * after),
        # Vaswani et al.: proportional to 1 / sqrt(step) after the warmup
        InverseSqrt(WARMUP): PEAK * np.sqrt(WARMUP / np.maximum(steps, WARMUP)),
        InverseSqrt(WARMUP, timescale=40): PEAK * np.sqrt(40 / (40 + after)),
    }
    for settings, rates in expected.items():
        got = values(settings.build(PEAK, TOTAL), steps)
        np.testing.assert_allclose(got[WARMUP:], rates[WARMUP:], rtol=1e-5, err_msg=str(settings))


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_warmup_stable_decay_has_three_parts(shape):
    settings = WarmupStableDecay(10, decay_fraction=0.4, final_fraction=0.2, decay_shape=shape)
    schedule = settings.build(PEAK, 100)
    np.testing.assert_allclose(values(schedule, range(10, 61)), PEAK, rtol=1e-6)
    decay = {"linear": Linear, "cosine": Cosine}[shape](final_fraction=0.2).build(PEAK, 40)
    np.testing.assert_allclose(
        values(schedule, range(60, 101)), values(decay, range(41)), rtol=1e-5
    )
    assert float(schedule(61)) < PEAK


def test_decay_over_the_whole_run_is_linear():
    whole = WarmupStableDecay(decay_fraction=1.0).build(PEAK, TOTAL)
    linear = Linear().build(PEAK, TOTAL)
    np.testing.assert_allclose(values(whole, range(60)), values(linear, range(60)), atol=1e-8)


def test_inverse_sqrt_without_a_warmup_takes_a_tenth_of_the_run():
    rates = values(InverseSqrt().build(PEAK, 1000), [0, 300, 1000])
    np.testing.assert_allclose(rates, PEAK / np.sqrt([1, 4, 11]), rtol=1e-6)
    assert float(InverseSqrt().build(PEAK, 3)(2)) > 0


@pytest.mark.parametrize(
    ("settings", "total", "says"),
    [
        (Linear(warmup_steps=10), 10, "warmup_steps"),
        (Constant(warmup_steps=11), 10, "between 0 and total_steps - 1 = 9"),
        (Cosine(warmup_steps=-1), 10, "warmup_steps"),
        (InverseTime(), 0, "total_steps"),
        (Linear(final_fraction=1.5), 10, "final_fraction"),
        (Cosine(final_fraction=-0.1), 10, "final_fraction"),
        (WarmupStableDecay(decay_fraction=0.0), 10, "'constant'"),
        (WarmupStableDecay(decay_fraction=1.1), 10, "decay_fraction"),
        (WarmupStableDecay(warmup_steps=3, decay_fraction=0.8), 10, "do not fit into 10 steps"),
        (WarmupStableDecay(decay_shape="sqrt"), 10, "decay_shape"),
        (InverseTime(decay=-1.0), 10, "decay"),
        (InverseTime(decay=float("nan")), 10, "decay"),
        (InverseSqrt(timescale=0), 10, "timescale"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, total, says):
    with pytest.raises(ValueError, match=says):
        settings.build(PEAK, total)


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="'cosin'") as error:
        schedule_named("cosin")
    assert all(name in str(error.value) for name in SCHEDULES)
    assert schedule_named("cosine") is Cosine
