"""Hidden states, attention maps and relations: against numpy, masks, chunks, layer maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.distillation.features import (
    every_layer,
    hidden_cosine,
    hidden_mse,
    over_pairs,
    semi_orthogonal,
)
from compress.distillation.maps import attention_kl, relation_kl

B, T = 2, 7
WEIGHTS = jnp.ones((B, T)).at[0, 2].set(0).at[1, 5:].set(0).at[1, 0].set(2.5)
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1]])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def heads():
    """A student of 4 heads of 3 with 2 key/value heads, a teacher of 4 heads of 6."""
    student = {"q": normal(0, B, T, 4, 3), "k": normal(1, B, T, 2, 3), "v": normal(2, B, T, 2, 3)}
    teacher = {name: normal(i, B, T, 4, 6) for i, name in enumerate("qkv", 3)}
    return student, teacher


def causal_map(a, b, segments):
    """softmax(a b' / sqrt(K)) [B, H, T, T] in float64, one query at a time."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    out = np.zeros((B, a.shape[2], T, T))
    for n in range(B):
        for h in range(a.shape[2]):
            for t in range(T):
                see = [s for s in range(t + 1) if segments[n, s] == segments[n, t]]
                scores = np.array([a[n, t, h] @ b[n, s, h] for s in see]) / np.sqrt(a.shape[-1])
                e = np.exp(scores - scores.max())
                out[n, h, t, see] = e / e.sum()
    return out


def map_divergence(student, teacher, segments):
    s, t = causal_map(*student, segments), causal_map(*teacher, segments)
    inside = t > 0
    terms = np.where(inside, t * np.log(np.where(inside, t, 1) / np.where(inside, s, 1)), 0)
    return (np.asarray(WEIGHTS) * terms.sum(axis=-1).mean(axis=1)).sum()


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_attention_against_numpy(strict, heads, chunk, segments):
    student, teacher = heads
    value = attention_kl(student, teacher, WEIGHTS, segments, chunk)
    repeated = np.repeat(np.asarray(student["k"]), 2, axis=2)
    expected = map_divergence(
        (student["q"], repeated),
        (teacher["q"], teacher["k"]),
        np.ones((B, T)) if segments is None else np.asarray(segments),
    )
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [3, 64])
def test_relations_against_numpy(strict, heads, chunk):
    student, teacher = heads
    value = relation_kl(student, teacher, WEIGHTS, SEGMENTS, heads=2, chunk=chunk)
    expected = 0
    for name in "qkv":
        s, t = (np.asarray(x[name]).reshape(B, T, 2, -1) for x in (student, teacher))
        expected += map_divergence((s, s), (t, t), np.asarray(SEGMENTS)) / 3
    assert value == pytest.approx(expected, rel=1e-5)


def test_hidden_states_against_numpy(strict):
    x, y, p = normal(0, B, T, 4), normal(1, B, T, 6), normal(2, 4, 6)
    s, t = np.asarray(x, np.float64) @ np.asarray(p), np.asarray(y, np.float64)
    cosine = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    weights = np.asarray(WEIGHTS)
    assert hidden_cosine(x, y, WEIGHTS, p) == pytest.approx(
        (weights * (1 - cosine)).sum(), rel=1e-5
    )
    expected = (weights * np.square(s - t).mean(-1)).sum()
    assert hidden_mse(x, y, WEIGHTS, p) == pytest.approx(expected, rel=1e-5)


def every_loss(heads):
    """name -> (loss of a student tree, a student, a student that is the teacher)."""
    student, teacher = heads
    x, y = normal(6, B, T, 5), normal(7, B, T, 5)
    return {
        "attention": (lambda s: attention_kl(s, teacher, WEIGHTS, None, 3), student, teacher),
        "relation": (
            lambda s: relation_kl(s, teacher, WEIGHTS, None, heads=3, chunk=3),
            student,
            teacher,
        ),
        "cosine": (lambda s: hidden_cosine(s, y, WEIGHTS), x, 2 * y),
        "mse": (lambda s: hidden_mse(s, y, WEIGHTS), x, y),
    }


@pytest.mark.parametrize("name", ["attention", "relation", "cosine", "mse"])
def test_gradients_against_differences_and_zero_at_the_teacher(strict, heads, name):
    loss, student, same = every_loss(heads)[name]
    grads = jax.grad(loss)(student)
    direction = jax.tree.map(lambda g: normal(9, *g.shape), grads)
    along = sum(
        float((g * d).sum())
        for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
    )
    h = 1e-2  # float32: the error of a central difference is least near its cube root
    up, down = (
        float(loss(jax.tree.map(lambda s, d, h=h: s + h * d, student, direction))) for h in (h, -h)
    )
    assert along == pytest.approx((up - down) / (2 * h), rel=1e-2, abs=2e-3)
    assert abs(along) > 1e-2
    assert abs(loss(same)) < 1e-5
    assert all(jnp.abs(g).max() < 1e-5 for g in jax.tree.leaves(jax.grad(loss)(same)))


def test_positions_without_weight_contribute_nothing(strict, heads):
    x, y = normal(0, B, T, 5), normal(1, B, T, 5)
    for loss in (hidden_cosine, hidden_mse):
        clean = jax.value_and_grad(loss)(x, y, WEIGHTS)
        dirty = jax.value_and_grad(loss)(x.at[0, 2].set(jnp.nan), y.at[1, 6].set(1e9), WEIGHTS)
        assert clean[0] == dirty[0]
        assert (clean[1] == dirty[1]).all()
        assert not clean[1][0, 2].any()
    # A query without weight; keys after the last query with weight.
    student, teacher = heads
    loss = functools.partial(attention_kl, chunk=3)
    grads = jax.grad(loss)(student, teacher, WEIGHTS)
    assert not grads["q"][0, 2].any()
    assert not grads["k"][1, 5:].any()
    assert grads["k"][1, :5].any()
    assert grads["k"][0, 2].any()  # later queries see it


def test_zero_vectors_have_a_gradient(strict):
    x, y = jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3))
    value, grad = jax.value_and_grad(hidden_cosine)(x, y, jnp.ones((1, 2)))
    assert value == 2
    assert jnp.isfinite(grad).all()


def test_a_learned_projection_learns(strict):
    x, y = normal(0, B, T, 3), normal(1, B, T, 5)
    p = semi_orthogonal(jax.random.key(0), 3, 5)
    value, grad = jax.value_and_grad(lambda p: hidden_mse(x, y, WEIGHTS, p))(p)
    assert hidden_mse(x, y, WEIGHTS, p - 1e-2 * grad) < value


def test_layer_maps():
    assert every_layer(6, 12) == ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12))
    assert every_layer(4, 6) == ((1, 2), (2, 3), (3, 5), (4, 6))
    assert every_layer(4, 2) == ((1, 1), (2, 1), (3, 2), (4, 2))
    tree = {"x": jnp.array([1.0, 10.0, 100.0])}
    loss = lambda s, t: s["x"] * t["x"]
    assert over_pairs(loss, tree, tree, [(0, 2), (1, 1)]) == 100.0


def test_bad_input(heads):
    student, teacher = heads
    fewer = {name: x[:, :, :2] for name, x in teacher.items()}
    with pytest.raises(ValueError, match="student has 4 heads and the teacher 2"):
        attention_kl(student, fewer, WEIGHTS)
    with pytest.raises(ValueError, match=r"k is 6 wide .2 heads of 3.*into 4 relation heads"):
        relation_kl(student, teacher, WEIGHTS, heads=4)
    with pytest.raises(ValueError, match=r"give a projection \[4, 6\]"):
        hidden_mse(normal(0, B, T, 4), normal(1, B, T, 6), WEIGHTS)
