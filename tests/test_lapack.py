"""Factorizations of batches: the same results, and never a batch for LAPACK on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress.gradients_lowrank import power_sgd
from compress.lowrank import factorize
from model.flops import abstract_params
from model.lapack import one_by_one
from model.presets import gpt2_tiny
from train.optimizers import OPTIMIZERS, build
from train.optimizers.matrix import MatrixSettings
from train.optimizers.orthogonal import coefficients_named, orthogonalize
from train.optimizers.per_layer import per_layer
from train.optimizers.soap import scale_by_soap
from train.schedules import Constant


def matrices(*shape, seed=0):
    x = jax.random.normal(jax.random.key(seed), shape)
    return x @ x.mT + jnp.eye(shape[-1])[(None,) * (len(shape) - 2)]


FACTORIZATIONS = {
    "cholesky": (jnp.linalg.cholesky,),
    "eigh": (lambda m: jnp.linalg.eigh(m)[0],),
    "qr": (lambda m: jnp.linalg.qr(m)[0],),
    "svd": (lambda m: jnp.linalg.svd(m)[1],),
    "triangular": (jax.scipy.linalg.solve_triangular, matrices(2, 3, 5, 5, seed=1)),
}


def ranks_for_lapack(fn, *args):
    """Ranks of what a program for CPUs hands to LAPACK and BLAS."""
    text = jax.jit(fn).lower(*args).as_text()
    calls = re.findall(r"@(?:lapack|blas)_\w+\(.*?: \((.*?)\)", text)
    return {each.count("x") for call in calls for each in re.findall(r"tensor<([^>]*)>", call)}


@pytest.mark.parametrize("name", FACTORIZATIONS)
def test_as_the_batch_at_once_and_one_at_a_time(name, strict):
    fn, *more = FACTORIZATIONS[name]
    a = matrices(2, 3, 5, 5)
    for form in (
        lambda *a: one_by_one(fn, *a),
        lambda *a: jax.vmap(lambda *one: one_by_one(fn, *one))(*a),
        lambda *a: jax.vmap(jax.vmap(lambda *one: one_by_one(fn, *one)))(*a),
    ):
        np.testing.assert_allclose(form(a, *more), fn(a, *more), rtol=1e-4, atol=1e-5)
        # A rank of 2, and for some of them arrays without axes beside the matrix.
        assert max(ranks_for_lapack(form, a, *more)) == 2
    assert max(ranks_for_lapack(fn, a, *more)) == 4  # so the test sees a batch where there is one


def test_what_is_not_batched_is_shared():
    a, b = matrices(3, 4, 4), matrices(4, 4, seed=1)
    solve = jax.scipy.linalg.solve_triangular
    shared = jax.vmap(lambda one: one_by_one(solve, one, b))(a)
    np.testing.assert_allclose(shared, solve(a, jnp.broadcast_to(b, a.shape)), rtol=1e-4, atol=1e-5)


def test_a_tree_of_results_and_no_leading_axes():
    a = matrices(4, 4)
    values, vectors = one_by_one(jnp.linalg.eigh, a)
    np.testing.assert_allclose((vectors * values) @ vectors.mT, a, atol=1e-4)
    assert [r.shape for r in one_by_one(jnp.linalg.eigh, a[None])] == [(1, 4), (1, 4, 4)]


@pytest.mark.parametrize(
    "name", [n for n, kind in OPTIMIZERS.items() if issubclass(kind, MatrixSettings)]
)
def test_no_optimizer_hands_over_a_batch(name):
    params = abstract_params(gpt2_tiny())
    tx = build(OPTIMIZERS[name](), Constant(), 10, params)
    state = jax.eval_shape(tx.init, params)
    assert max(ranks_for_lapack(tx.update, params, state, params), default=0) <= 2


def test_nor_do_the_others():
    x = matrices(3, 8, 8)
    tx = optax.chain(per_layer(scale_by_soap()))
    soap = {"blocks": {"kernel": x}}
    for fn, *args in (
        (power_sgd(2, jax.random.key(0)).orthogonalise, x[..., :2]),
        (lambda w, h: factorize(w, 2, h), x, x),
        (
            lambda w: orthogonalize(
                w, coefficients_named("standard", 2), preconditioning="spectral"
            ),
            x,
        ),
        (tx.update, soap, tx.init(soap), soap),
    ):
        assert max(ranks_for_lapack(fn, *args)) == 2
