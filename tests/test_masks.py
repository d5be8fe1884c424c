"""Masks: exact counts, ties, patterns along the right axis, all against plain NumPy."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.pruning.masks import (
    blocks,
    check_sparsity,
    keep_top,
    magnitude,
    movement,
    n_of_m,
    random_score,
    saliency,
    unstructured,
    zeros_of,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sorted_top(scores, keep):
    """The slow way: a stable sort of everything."""
    flat = np.concatenate([np.ravel(score) for score in scores])
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    parts = np.split(mask, np.cumsum([score.size for score in scores])[:-1])
    return [part.reshape(score.shape) for part, score in zip(parts, scores, strict=True)]


@pytest.mark.parametrize("keep", [0, 1, 7, 29, 30])
@pytest.mark.parametrize("kind", ["distinct", "ties", "constant", "negative", "wide"])
def test_keep_top_equals_a_stable_sort(strict, kind, keep):
    one, two = normal(0, 4, 6), normal(1, 2, 3)
    change = {
        "distinct": lambda x: x,
        "ties": np.round,
        "constant": np.zeros_like,
        "negative": lambda x: -np.abs(x),
        "wide": lambda x: np.sign(x) * np.exp(40 * x),
    }[kind]
    scores = [change(one), change(two)]
    got = jax.jit(keep_top)([jnp.asarray(s) for s in scores], keep)
    for mask, expected in zip(got, sorted_top(scores, keep), strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_keep_top_of_special_values():
    scores = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, 1e-40, 3.0])
    np.testing.assert_array_equal(keep_top([scores], 1)[0], [0, 0, 1, 0, 0, 0])
    assert keep_top([jnp.array([-0.0, 0.0])], 1)[0].tolist() == [True, False]  # both zeros alike
    assert keep_top([scores], 100)[0].all()
    nan = jnp.array([1.0, jnp.nan, 2.0])
    assert keep_top([nan], 1)[0].tolist() == [False, True, False]


def test_a_layer_of_a_vmap_is_ranked_by_itself(strict):
    scores = np.abs(normal(2, 3, 5, 8)) * np.array([0.01, 1, 100], np.float32)[:, None, None]
    sparsities = jnp.array([0.0, 0.25, 0.9])
    masks = jax.jit(jax.vmap(unstructured))(jnp.asarray(scores), sparsities)
    for i, zeros in enumerate([0, 10, 36]):
        np.testing.assert_array_equal(masks[i], sorted_top([scores[i]], 40 - zeros)[0])


def test_zeros_of_counts_exactly(strict):
    rng = np.random.default_rng(0)
    sizes = [1, 2, 3, 64, 4095, 4096, 4097, 768 * 3072, 2**24 - 1, *rng.integers(1, 2**24, 200)]
    shares = rng.random(len(sizes))
    got = jax.jit(jax.vmap(zeros_of))(
        jnp.asarray(shares, jnp.float32), jnp.asarray(sizes, jnp.uint32)
    )
    for sparsity, size, zeros in zip(shares, sizes, got, strict=True):
        product = Fraction(float(sparsity)) * int(size)
        if abs(product % 1 - Fraction(1, 2)) > Fraction(int(size), 2**24):  # not a close call
            assert int(zeros) == round(product), (sparsity, size)
    assert int(zeros_of(0.9, 2_359_296)) == 2_123_366
    assert int(zeros_of(0.0, 2**31 - 1)) == 0
    assert int(zeros_of(1.0, 2**31 - 1)) == 2**31 - 1
    got = jax.jit(zeros_of)(jnp.array([0.5, 0.25]), jnp.int32(12))
    assert got.tolist() == [6, 3]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75, 0.999])
def test_unstructured_has_exactly_the_zeros_asked_for(sparsity):
    score = jnp.asarray(np.abs(normal(3, 17, 13)))
    mask = unstructured(score, sparsity)
    assert int((~mask).sum()) == int(17 * 13 * sparsity + 0.5)
    if 0 < sparsity:
        assert float(jnp.where(mask, score, jnp.inf).min()) >= float(
            jnp.where(mask, -jnp.inf, score).max()
        )


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("axis", [-2, -1, 0, 1])
def test_n_of_m_along_the_contraction_axis(strict, n, m, axis):
    score = np.round(np.abs(normal(4, 16, 24)), 1)  # with ties
    mask = np.asarray(n_of_m(m, axis=axis)(jnp.asarray(score), 1 - n / m))
    rows = np.moveaxis(score, axis, -1).reshape(-1, m)
    kept = np.moveaxis(mask, axis, -1).reshape(-1, m)
    np.testing.assert_array_equal(kept.sum(axis=1), n)
    for row, marks in zip(rows, kept, strict=True):
        np.testing.assert_array_equal(marks, sorted_top([row], n)[0])
    # and not along the other one
    other = np.moveaxis(mask, -1 if axis in (-2, 0) else -2, -1).reshape(-1, m).sum(axis=1)
    assert (other != n).any()


def test_blocks_go_whole(strict):
    score = np.abs(normal(5, 12, 20))
    mask = np.asarray(blocks(3, 4)(jnp.asarray(score), 0.6))
    tiles = mask.reshape(4, 3, 5, 4).swapaxes(1, 2).reshape(20, 12)
    means = score.reshape(4, 3, 5, 4).swapaxes(1, 2).reshape(20, 12).mean(axis=1)
    assert set(tiles.sum(axis=1)) <= {0, 12}
    np.testing.assert_array_equal(tiles[:, 0], sorted_top([means], 8)[0])


def test_scores():
    w, g = normal(6, 3, 4), normal(7, 3, 4)
    np.testing.assert_allclose(magnitude(jnp.asarray(w)), np.abs(w))
    np.testing.assert_allclose(saliency(jnp.asarray(w), jnp.asarray(g)), np.abs(w * g))
    np.testing.assert_allclose(movement(jnp.asarray(w), jnp.asarray(g)), -w * g)
    half = magnitude(jnp.asarray(w, jnp.bfloat16))
    assert half.dtype == jnp.float32
    one, other = (random_score(jax.random.key(i), (64, 64)) for i in (0, 1))
    assert abs(float(jnp.corrcoef(one.ravel(), other.ravel())[0, 1])) < 0.1
    np.testing.assert_array_equal(one, random_score(jax.random.key(0), (64, 64)))


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, float("nan"), True, "0.5", None])
def test_a_sparsity_is_a_share(sparsity):
    with pytest.raises(ValueError, match=r"share of zeros, 0 <= sparsity < 1"):
        check_sparsity(sparsity, "a kernel")


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="leaves no weight"):
        check_sparsity(1.0, "a kernel")
    with pytest.raises(ValueError, match=r"groups .* of 4 do not divide the 6 along axis -2"):
        n_of_m(4)(jnp.ones((6, 8)), 0.5)
    with pytest.raises(ValueError, match=r"blocks of 3 do not divide the 8 along axis -1"):
        blocks(2, 3)(jnp.ones((6, 8)), 0.5)
    with pytest.raises(ValueError, match="cut from matrices"):
        n_of_m(4)(jnp.ones(8), 0.5)
    with pytest.raises(ValueError, match="nothing to choose from"):
        n_of_m(1)
    with pytest.raises(ValueError, match="holds no weight"):
        blocks(0, 4)
    with pytest.raises(ValueError, match="too many to be ranked together"):
        jax.eval_shape(keep_top, [jax.ShapeDtypeStruct((2**16, 2**15), "float32")], 1)
