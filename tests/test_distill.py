"""Divergences of logits: values and gradients against numpy, masks, limits, chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.distillation.logits import DIVERGENCES, forward_kl, jensen_shannon, reverse_kl

N, V = 5, 11
ALL = {name: make(0.3) for name, make in DIVERGENCES.items()}


@pytest.fixture
def logits():
    student, teacher = jax.random.normal(jax.random.key(0), (2, N, V)) * 2
    return student, teacher, jnp.array([1.0, 0.0, 2.0, 1.0, 0.5])


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def kl(a, b):
    return (a * np.log(a / b)).sum(axis=-1)


def by_numpy(name, student, teacher, weights, T):
    p, q = (softmax(np.asarray(x, np.float64) / T) for x in (teacher, student))
    m = 0.3 * p + 0.7 * q
    values = {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "jensen_shannon": 0.3 * kl(p, m) + 0.7 * kl(q, m),
    }
    return T**2 * (np.asarray(weights) * values[name]).sum()


@pytest.mark.parametrize("T", [1.0, 3.0])
@pytest.mark.parametrize("name", ALL)
def test_value_and_gradient_against_numpy(strict, logits, name, T):
    student, teacher, weights = logits
    value, grad = jax.value_and_grad(ALL[name])(student, teacher, weights, T)
    assert value == pytest.approx(by_numpy(name, student, teacher, weights, T), rel=1e-5)
    for n, v in ((0, 3), (2, 7), (4, 0)):  # float64 differences
        step = np.zeros((N, V))
        step[n, v] = 1e-5
        exact = np.asarray(student, np.float64)
        up, down = (by_numpy(name, exact + s, teacher, weights, T) for s in (step, -step))
        assert grad[n, v] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-5)


def test_gradients_in_closed_form(strict, logits):
    """T^2 KL has the gradient T (Q - P), and the reverse T Q (log Q - log P - KL(Q || P))."""
    student, teacher, weights = logits
    T = 2.0
    p, q = softmax(np.asarray(teacher) / T), softmax(np.asarray(student) / T)
    forward = np.asarray(weights)[:, None] * T * (q - p)
    np.testing.assert_allclose(
        jax.grad(forward_kl)(student, teacher, weights, T), forward, rtol=1e-4, atol=1e-6
    )
    centred = np.log(q / p) - kl(q, p)[:, None]
    np.testing.assert_allclose(
        jax.grad(reverse_kl)(student, teacher, weights, T),
        np.asarray(weights)[:, None] * T * q * centred,
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ALL)
def test_zero_where_student_is_teacher(strict, logits, name):
    student, _, weights = logits
    shifted = student + 3  # the same distribution
    value, grad = jax.value_and_grad(ALL[name])(student, shifted, weights, 1.5)
    assert abs(value) < 1e-5
    assert jnp.abs(grad).max() < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_masked_positions_contribute_nothing_whatever_they_hold(strict, logits, name):
    student, teacher, weights = logits
    clean = jax.value_and_grad(ALL[name])(student, teacher, weights, 1.0)
    dirty = jax.value_and_grad(ALL[name])(
        student.at[1].set(jnp.nan), teacher.at[1].set(jnp.inf), weights, 1.0
    )
    assert clean[0] == dirty[0]
    assert (clean[1] == dirty[1]).all()
    assert not dirty[1][1].any()
    assert clean[1][0].any()


@pytest.mark.parametrize("name", ALL)
def test_tokens_that_the_teacher_rules_out(strict, logits, name):
    student, teacher, weights = logits
    ruled_out = teacher.at[:, 2].set(-jnp.inf)
    value, grad = jax.value_and_grad(ALL[name])(student, ruled_out, weights, 1.0)
    if name == "reverse":  # which forbids them
        assert value == jnp.inf
    else:
        assert jnp.isfinite(value)
        assert jnp.isfinite(grad).all()
        finite = by_numpy(name, student, teacher.at[:, 2].set(-60.0), weights, 1.0)
        assert value == pytest.approx(finite, rel=1e-5)


def test_jensen_shannon_lies_between_the_two(strict, logits):
    student, teacher, weights = logits
    arguments = (student / 2, teacher / 2, weights, 1.0)
    forward, reverse = forward_kl(*arguments), reverse_kl(*arguments)
    assert abs(forward - reverse) > 0.05 * forward
    # To first order in beta the error is beta times a chi-squared distance.
    for beta, limit in ((1e-3, forward), (1 - 1e-3, reverse)):
        near = jensen_shannon(beta)(*arguments) / min(beta, 1 - beta)
        assert near == pytest.approx(float(limit), rel=1e-2)
    half = jensen_shannon(0.5)
    mirrored = half(arguments[1], arguments[0], *arguments[2:])
    assert half(*arguments) == pytest.approx(float(mirrored), rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_chunk_at_a_time_is_the_same_sum(strict, logits, name):
    student, teacher, weights = logits
    parts = (ALL[name](student[a:b], teacher[a:b], weights[a:b], 2.0) for a, b in ((0, 2), (2, 5)))
    whole = ALL[name](student, teacher, weights, 2.0)
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_half_precision_is_summed_in_float32_and_traced_temperatures_fit(strict, logits):
    student, teacher, weights = logits
    half = [x.astype(jnp.bfloat16) for x in (student, teacher)]
    value = jax.jit(forward_kl)(*half, weights, jnp.float32(2.0))
    assert value.dtype == jnp.float32
    exact = by_numpy("forward", *(x.astype(jnp.float32) for x in half), weights, 2.0)
    assert value == pytest.approx(exact, rel=1e-5)


def test_large_temperatures_match_centred_logits(strict, logits):
    """T^2 KL tends to |s - t|^2 / 2V of the centred logits (Hinton et al. 2015, section 2.1)."""
    student, teacher, weights = logits
    difference = student - teacher
    difference = difference - difference.mean(axis=-1, keepdims=True)
    expected = (weights * jnp.square(difference).sum(axis=-1)).sum() / (2 * V)
    # A hundred: the next term falls with 1/T, and float32 loses digits with T^2.
    assert forward_kl(student, teacher, weights, 100.0) == pytest.approx(float(expected), rel=2e-2)


def test_bad_input(logits):
    student, teacher, weights = logits
    with pytest.raises(ValueError, match="a vocabulary of 7 tokens and the student one of 11"):
        forward_kl(student, teacher[:, :7], weights)
    with pytest.raises(ValueError, match=r"must be \[N, V\], \[N, V\] and \[N\]"):
        reverse_kl(student, teacher, weights[:3])
    with pytest.raises(ValueError, match="temperature is 0"):
        forward_kl(student, teacher, weights, 0)
    for beta in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="must be above 0 and below 1"):
            jensen_shannon(beta)
