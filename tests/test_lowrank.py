"""Factors of weights: the best there are by NumPy, and weights like any other in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.lowrank import LowRank, Sum, compensate, factorize, plain_array
from compress.quantization.rounding import quantize

pytestmark = pytest.mark.usefixtures("strict")
W = jax.random.normal(jax.random.key(0), (3, 64, 10))
X = np.random.default_rng(0).normal(size=(3, 500, 64)) @ np.random.default_rng(1).normal(
    size=(3, 64, 64)
)
H = jnp.asarray(np.einsum("lni,lnj->lij", X, X), jnp.float32)


def output_error(w, low, x=X):
    return np.square(x @ (np.asarray(w, np.float64) - np.asarray(low.full(), np.float64))).sum()


def test_plain_factors_are_eckart_and_young():
    low = factorize(W, 4)
    values = np.linalg.svd(np.asarray(W, np.float64), compute_uv=False)
    lost = np.square(np.asarray(W - low.full())).sum(axis=(1, 2))
    np.testing.assert_allclose(lost, np.square(values[:, 4:]).sum(axis=1), rtol=1e-4)
    assert (low.a.shape, low.b.shape) == ((3, 64, 4), (3, 4, 10))
    np.testing.assert_allclose(  # balanced
        jnp.linalg.norm(low.a, axis=1), jnp.linalg.norm(low.b, axis=2), rtol=1e-4
    )


@pytest.mark.parametrize("axis", [-2, -1])
def test_weighted_factors_reach_the_least_output_error(axis):
    """|X w - Y| over all Y of rank R is least for the truncated X w, by NumPy."""
    w = W if axis == -2 else W.swapaxes(-1, -2)
    low = factorize(w, 4, H, axis, damping=1e-6)
    low = low if axis == -2 else low.T
    least = np.square(np.linalg.svd(X @ np.asarray(W), compute_uv=False)[:, 4:]).sum()
    assert output_error(W, low) < 1.001 * least
    assert output_error(W, factorize(W, 4)) > 1.2 * least


def test_a_stack_is_its_layers():
    whole = factorize(W, 3, H)
    for layer in range(3):
        one = factorize(W[layer], 3, H[layer])
        np.testing.assert_allclose(one.full(), whole.full()[layer], atol=1e-4)
    mapped = jax.vmap(lambda w, h: factorize(w, 3, h))(W, H)
    np.testing.assert_allclose(mapped.full(), whole.full(), atol=1e-4)


KINDS = {
    "low": lambda: factorize(W, 4),
    "low.T.T": lambda: factorize(W, 4).T.T,
    "int8 + low": lambda: compensate(quantize(W, "int8"), W, 2),
    "q4_0 + low": lambda: compensate(quantize(W, "q4_0"), W, 2),
    "table.T + low": lambda: compensate(quantize(W.swapaxes(-1, -2), "int8", -1).T, W, 2),
    "masked + low": lambda: compensate(jnp.where(jnp.abs(W) > 1, W, 0), W, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_plain_weight(kind):
    w = KINDS[kind]()
    plain = w.full()
    assert (w.shape, w.ndim, w.dtype) == (plain.shape, 3, jnp.float32)
    np.testing.assert_array_equal(w.dequantize(), plain)
    x = jax.random.normal(jax.random.key(1), (3, 5, 64))
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(x @ w, x @ plain, **close)
    y = jax.random.normal(jax.random.key(2), (3, 5, 10))
    np.testing.assert_allclose(y @ w.T, y @ plain.swapaxes(-1, -2), **close)
    np.testing.assert_allclose(w.T.full(), plain.swapaxes(-1, -2), **close)
    np.testing.assert_allclose(jax.vmap(lambda x, w: x @ w)(x, w), x @ plain, **close)
    _, scanned = jax.lax.scan(lambda c, xw: (c, xw[0] @ xw[1]), 0, (x, w))
    np.testing.assert_allclose(scanned, x @ plain, **close)
    one = jax.tree.map(lambda leaf: leaf[1], w)
    np.testing.assert_allclose(x[1, 0] @ one, x[1, 0] @ plain[1], **close)
    np.testing.assert_allclose(x[1:2] @ one, x[1:2] @ plain[1:2], **close)
    ids = jnp.array([[3, 0], [63, 3]])
    np.testing.assert_allclose(one.take(ids), plain[1][ids], **close)
    assert jnp.isnan(one.take(jnp.array([64]))).all()
    assert (x.astype(jnp.bfloat16) @ w).dtype == jnp.bfloat16
    assert w.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(w))
    np.testing.assert_allclose(np.asarray(x) @ w, x @ plain, **close)


def test_gradients_reach_the_factors():
    low = factorize(W[0], 4)
    x = jax.random.normal(jax.random.key(1), (5, 64))
    g = jax.grad(lambda w: jnp.sum(jnp.square(x @ w)))(low)
    outer = np.asarray(2 * x.T @ (x @ low.full()), np.float64)
    np.testing.assert_allclose(g.a, outer @ np.asarray(low.b).T, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(g.b, np.asarray(low.a).T @ outer, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("base", ["int3", "pruned"])
def test_compensation_helps_the_outputs_most_where_it_knows_them(base):
    b = quantize(W, "int3") if base == "int3" else jnp.where(jnp.abs(W) > 0.7, W, 0)
    weighted, blind = compensate(b, W, 3, H), compensate(b, W, 3)
    bare = Sum(b, LowRank(jnp.zeros((3, 64, 1)), jnp.zeros((3, 1, 10))))
    assert output_error(W, weighted) < output_error(W, blind) < output_error(W, bare)
    whole = compensate(b, W, 10, H)
    np.testing.assert_allclose(whole.full(), W, atol=1e-3)


def test_types_and_plain_array():
    w = W.astype(jnp.bfloat16)
    assert factorize(w, 2).a.dtype == compensate(quantize(w, "int8"), w, 2).low.b.dtype == w.dtype
    assert plain_array(W, jnp.bfloat16).dtype == jnp.bfloat16
    assert plain_array(quantize(W, "int8"), jnp.float32).shape == W.shape


def test_bad_input():
    cases = [
        (lambda: factorize(W, 11), r"ranks from 1 to 10, not 11"),
        (lambda: factorize(W, 0), "ranks from 1"),
        (lambda: factorize(W[0, 0], 1), "floating-point matrices"),
        (lambda: factorize(W, 2, axis=0), "-1 or -2"),
        (lambda: factorize(W, 2, H[0]), r"needs a Hessian of shape \(3, 64, 64\)"),
        (lambda: factorize(W, 2, -H), "not positive definite"),
        (lambda: factorize(W * jnp.nan, 2), "weight .* holds NaN"),
        (lambda: factorize(W, 2, H * jnp.inf), "Hessian .* holds NaN"),
        (lambda: compensate(W[0], W, 2), "cannot stand for"),
        (lambda: factorize(W, 2).take(jnp.array([0])), "rows are taken of a matrix"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
