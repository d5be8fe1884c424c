"""Orthogonal factors against the SVD, and coefficients against the published ones."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from train.optimizers.orthogonal import (
    _gram_is_cheaper,
    coefficients_named,
    orthogonalize,
    polar_express,
)

# Amsel et al., arXiv 2505.16932, the listing of their algorithm, before its safety factor.
PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def matrices(*shape, smallest=1e-2):
    """Random singular vectors, singular values from 1 down to the smallest."""
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    values = np.geomspace(1.0, smallest, min(shape[-2:]))
    return (u * values) @ vt, u @ vt


def test_polar_express_has_the_published_coefficients():
    np.testing.assert_allclose(polar_express(8, safety=0.0), PUBLISHED, rtol=1e-6)
    # rounded to 4 digits, as they stand in speed-run code: 5 steps, safety 0.02
    safe = polar_express(2, safety=0.02)[0]
    np.testing.assert_allclose(safe, np.divide(PUBLISHED[0], [1.02, 1.02**3, 1.02**5]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 24), (2, 24, 6)])
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_enough_steps_give_the_orthogonal_factor_of_the_svd(strict, shape, form):
    x, polar = matrices(*shape)
    for coefficients in (polar_express(9), coefficients_named("exact", 15)):
        got = orthogonalize(jnp.asarray(x, jnp.float32), coefficients, form)
        np.testing.assert_allclose(got, polar, atol=1e-4)


@pytest.mark.parametrize("name", ["standard", "dion", "polar_express"])
@pytest.mark.parametrize("preconditioning", ["frobenius", "spectral", "aol", "schatten"])
def test_the_gram_form_equals_the_plain_one(strict, name, preconditioning):
    """With five steps, on matrices whose Gram matrix float32 cannot resolve as well."""
    coefficients = coefficients_named(name, 5)
    for smallest in (1e-2, 1e-6):
        x = jnp.asarray(matrices(2, 16, 48, smallest=smallest)[0], jnp.float32)
        plain = orthogonalize(x, coefficients, "plain", preconditioning)
        gram = orthogonalize(x, coefficients, "gram", preconditioning)
        atol = 1e-4 if smallest > 1e-3 else 0.1
        np.testing.assert_allclose(gram, plain, atol=atol)


def test_polynomials_act_on_the_singular_values():
    """Against p_5(... p_1(s)) in float64 on the singular values of the scaled matrix."""
    coefficients = coefficients_named("standard", 5)
    x, _ = matrices(8, 24)
    u, values, vt = np.linalg.svd(x, full_matrices=False)
    values = values / np.linalg.norm(x)
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    for form in ("plain", "gram", "auto"):
        got = orthogonalize(jnp.asarray(x, jnp.float32), coefficients, form)
        np.testing.assert_allclose(got, (u * values) @ vt, atol=1e-4)


def test_auto_takes_the_form_with_fewer_operations():
    assert not _gram_is_cheaper(64, 64, 5)
    assert _gram_is_cheaper(64, 256, 5)
    x = jnp.ones((2, 3, 9), jnp.bfloat16)
    assert orthogonalize(x, coefficients_named("standard", 5)).dtype == jnp.bfloat16


def test_zero_stays_zero():
    zero = jnp.zeros((2, 3, 9))
    for kind in ("frobenius", "spectral", "aol", "schatten"):
        assert not jnp.any(orthogonalize(zero, polar_express(3), "gram", kind))


def test_refusals():
    x = jnp.ones((3, 9))
    with pytest.raises(ValueError, match="auto, plain, gram"):
        orthogonalize(x, polar_express(2), "gramm")
    with pytest.raises(ValueError, match="needs float32"):
        orthogonalize(x.astype(jnp.bfloat16), polar_express(2), "gram")
    with pytest.raises(ValueError, match="frobenius, spectral"):
        orthogonalize(x, polar_express(2), preconditioning="none")
