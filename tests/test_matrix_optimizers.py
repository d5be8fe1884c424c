"""Optimizers of ours against their papers' equations, written out in NumPy for one matrix."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.optimizers import AdamW
from train.optimizers.adam_mini import AdamMini
from train.optimizers.averaging import averaged, tail_average
from train.optimizers.cautious import cautious, cautious_decayed_weights
from train.optimizers.hyperball import hyperball
from train.optimizers.kron import scale_by_kron
from train.optimizers.mars import Mars
from train.optimizers.muon import Muon
from train.optimizers.normuon import normalize_neurons
from train.optimizers.scion import Scion
from train.optimizers.shampoo import Shampoo, scale_by_shampoo
from train.optimizers.soap import Soap, scale_by_soap
from train.optimizers.table import build
from train.schedules import Constant

STEPS = 6
ROWS, COLUMNS = 4, 6


def gradients(steps=STEPS, shape=(ROWS, COLUMNS), seed=0):
    return np.random.default_rng(seed).normal(size=(steps, *shape))


def run(tx, grads, params=None):
    """The updates of all steps, [steps, ...]; the parameters stay where they are."""
    grads = jnp.asarray(grads, jnp.float32)
    params = jnp.ones(grads.shape[1:]) if params is None else params

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    return np.asarray(jax.jit(lambda: jax.lax.scan(step, tx.init(params), grads)[1])())


def root(a, power):
    values, vectors = np.linalg.eigh(a)
    return (vectors * values**power) @ vectors.T


def test_soap():
    """Algorithm 3; between refreshes the sign of an eigenvector does not matter."""
    b1, b2, s, eps = 0.9, 0.95, 0.8, 1e-8
    # square, so that the first gradient leaves no null space with a basis of its own choice
    grads = gradients(11, (ROWS, ROWS))
    left = right = mean = second = ql = qr = np.zeros((ROWS, ROWS))
    expected = []
    for t, g in enumerate(grads):
        if t:
            mean = b1 * mean + (1 - b1) * g
            second = b2 * second + (1 - b2) * (ql.T @ g @ qr) ** 2
            scaled = ql.T @ mean @ qr / (1 - b1**t) / (np.sqrt(second / (1 - b2**t)) + eps)
            expected.append(ql @ scaled @ qr.T)
        else:
            expected.append(0 * g)
        left, right = s * left + (1 - s) * g @ g.T, s * right + (1 - s) * g.T @ g
        if t == 0:
            ql, qr = np.linalg.eigh(left)[1][:, ::-1], np.linalg.eigh(right)[1][:, ::-1]
        elif t % 4 == 0:
            order = np.argsort(-np.diag(ql.T @ left @ ql))
            ql, second = np.linalg.qr(left @ ql[:, order])[0], second[order]
            order = np.argsort(-np.diag(qr.T @ right @ qr))
            qr, second = np.linalg.qr(right @ qr[:, order])[0], second[:, order]
    got = run(scale_by_soap(b1, b2, eps, shampoo_decay=s, frequency=4), grads)
    np.testing.assert_allclose(got, expected, atol=5e-3)


def test_soap_on_one_side_alone():
    """A side above the largest keeps its axes, and with both it is Adam."""
    grads = gradients()
    got = run(scale_by_soap(0.9, 0.95, largest_side=3), grads)[1:]
    np.testing.assert_allclose(got, run(optax.scale_by_adam(0.9, 0.95), grads[1:]), atol=1e-5)
    one = scale_by_soap(largest_side=5).init(jnp.ones((ROWS, COLUMNS)))
    assert one.left.shape == (ROWS, ROWS)
    assert one.right.shape == (0,)


@pytest.mark.parametrize("graft", ["none", "adam"])
def test_shampoo(graft):
    b1, b2, s, root_eps = 0.9, 0.95, 0.8, 1e-3
    grads = gradients()
    left, right = np.zeros((ROWS, ROWS)), np.zeros((COLUMNS, COLUMNS))
    mean, second, expected = 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        left, right = s * left + (1 - s) * g @ g.T, s * right + (1 - s) * g.T @ g
        mean, second = b1 * mean + (1 - b1) * g, b2 * second + (1 - b2) * g * g
        if t % 2 == 1:
            roots = [
                root(a + root_eps * np.linalg.eigvalsh(a)[-1] * np.eye(len(a)), -0.25)
                for a in (left / (1 - s**t), right / (1 - s**t))
            ]
        u = roots[0] @ (mean / (1 - b1**t)) @ roots[1]
        if graft == "adam":
            adam = mean / (1 - b1**t) / np.sqrt(second / (1 - b2**t))
            u = u * np.linalg.norm(adam) / np.linalg.norm(u)
        expected.append(u)
    tx = scale_by_shampoo(
        b1, b2, shampoo_decay=s, frequency=2, graft=graft, root_eps=root_eps, eps=1e-12
    )
    np.testing.assert_allclose(run(tx, grads), expected, rtol=2e-3, atol=2e-3)


def test_shampoo_roots_are_those_of_the_kronecker_product():
    """(L x R)^-1/4 on the flattened gradient, as the paper has it."""
    g = gradients(1)[0]
    left, right = g @ g.T, g.T @ g
    eps = 0.1
    damp = lambda a: a + eps * np.linalg.eigvalsh(a)[-1] * np.eye(len(a))
    expected = root(np.kron(damp(left), damp(right)), -0.25) @ g.reshape(-1)
    tx = scale_by_shampoo(graft="none", root_eps=eps)
    got = run(tx, g[None])[0]
    np.testing.assert_allclose(got.reshape(-1), expected, rtol=1e-3, atol=1e-3)


def test_kron_first_step():
    """One step of both factors from the identity, with the probe drawn as the code draws it."""
    rate = 0.2
    g = gradients(1)[0]
    key = jax.random.fold_in(jax.random.key(3), 0)
    v = np.asarray(jax.random.normal(key, (ROWS, COLUMNS)))
    factors = []
    for a, b in ((g, v), (g.T, v.T)):
        total, difference = a @ a.T + b @ b.T, a @ a.T - b @ b.T
        column = total[:, np.argmax(np.linalg.norm(total, axis=0))]
        bound = np.linalg.norm(total @ column) / np.linalg.norm(column)
        factors.append(np.eye(len(a)) - rate / bound * np.triu(difference))
    ql, qr = factors
    u = ql.T @ ql @ g @ qr.T @ qr
    u = u * min(1.0, 1.1 / np.sqrt((u**2).mean()))
    got = run(scale_by_kron(preconditioner_rate=rate, seed=3), g[None])[0]
    np.testing.assert_allclose(got, u, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_kron_whitens_a_gradient_of_known_covariance():
    """At rest P E[m m^T] P = 1: rows and columns of very different size come out alike."""
    rng = np.random.default_rng(0)
    left, right = np.diag([10.0, 1.0, 0.1]), np.diag([5.0, 0.5, 1.0, 0.2])
    grads = np.stack([left @ rng.normal(size=(3, 4)) @ right for _ in range(3000)])
    for largest in (8, 3, 1):
        tx = scale_by_kron(
            0.0, preconditioner_rate=0.05, least_updates=1.0, largest_side=largest, clip_rms=1e9
        )
        rms = np.sqrt((run(tx, grads)[2000:] ** 2).mean(0))
        assert rms.max() < 2.0 * rms.min()
        np.testing.assert_allclose(rms.mean(), 1.0, rtol=0.3)


def test_kron_moves_its_factors_as_often_as_asked():
    tx = scale_by_kron(least_updates=0.1)
    g = jnp.asarray(gradients(1)[0], jnp.float32)
    state = tx.init(g)._replace(count=jnp.int32(100_000))
    moved = 0
    update = jax.jit(tx.update)
    for _ in range(20):
        old = state.left
        _, state = update(g, state)
        moved += bool((old != state.left).any())
    assert moved == 2


def test_normuon_neurons():
    b2, eps = 0.9, 1e-10
    grads = gradients()
    second, expected = np.zeros((1, COLUMNS)), []
    for o in grads:
        second = b2 * second + (1 - b2) * (o**2).mean(0, keepdims=True)
        n = o / (np.sqrt(second) + eps)
        expected.append(n * np.linalg.norm(o) / np.linalg.norm(n))
    np.testing.assert_allclose(run(normalize_neurons(b2, eps), grads), expected, rtol=1e-4)


def test_mars():
    settings = Mars()
    b1, b2, gamma = settings.b1, settings.b2, settings.gamma
    grads = gradients()
    previous, mean, second, expected = grads[0], 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        c = g + gamma * b1 / (1 - b1) * (g - previous)
        c = c / max(1.0, np.linalg.norm(c))
        mean, second = b1 * mean + (1 - b1) * c, b2 * second + (1 - b2) * c * c
        expected.append(mean / (1 - b1**t) / (np.sqrt(second / (1 - b2**t)) + settings.eps))
        previous = g
    np.testing.assert_allclose(run(settings.direction(), grads), expected, rtol=1e-3, atol=1e-5)


def test_hyperball():
    rate = 0.3
    grads = gradients(2)
    params = jnp.asarray(gradients(1, seed=5)[0], jnp.float32)
    updates = run(hyperball(optax.identity(), lambda step: rate), grads, params)
    w = np.asarray(params, np.float64)
    size = np.linalg.norm(w)
    for g, update in zip(grads, updates, strict=True):
        new = w - rate * size * g / np.linalg.norm(g)
        np.testing.assert_allclose(w + update, size * new / np.linalg.norm(new), rtol=1e-4)


def test_hyperball_lets_a_zero_matrix_grow_to_its_sphere():
    tx = hyperball(optax.identity(), lambda step: 0.3)
    w = jnp.zeros((ROWS, COLUMNS))
    g = jnp.asarray(gradients(1)[0], jnp.float32)
    radius = 0.02 * (ROWS * COLUMNS) ** 0.5
    state, sizes = tx.init(w), []
    for _ in range(5):
        updates, state = tx.update(g, state, w)
        w = w + updates
        sizes.append(float(jnp.linalg.norm(w)) / radius)
    np.testing.assert_allclose(sizes, [0.3, 0.6, 0.9, 1.0, 1.0], rtol=1e-4)


@pytest.mark.parametrize("constrained", [False, True])
def test_scion(constrained):
    """The constrained step is a Frank-Wolfe step, and all steps have the radius of their norm."""
    settings = Scion(
        learning_rate=0.5, constrained=constrained, momentum=0.0, newton_schulz_steps=15,
        newton_schulz_coefficients="exact", spectral_radius=2.0, sign_radius=3.0, rms_radius=4.0,
    )  # fmt: skip
    draw = lambda seed, *shape: jnp.asarray(gradients(1, shape, seed)[0], jnp.float32)
    tree = lambda seed: {
        "blocks": {"up": {"kernel": draw(seed, 2, 4, 9), "bias": draw(seed + 1, 2, 9)}},
        "token_embedding": {"embedding": draw(seed + 2, 5, 4)},
        "head": {"kernel": draw(seed + 3, 4, 5)},
    }
    params, grads = tree(0), tree(10)
    tx = build(settings, Constant(), 10, params)
    updates, _ = jax.jit(lambda: tx.update(grads, tx.init(params), params))()
    shrink = lambda w: 0.5 * w if constrained else 0.0
    kernel, g = updates["blocks"]["up"]["kernel"], grads["blocks"]["up"]["kernel"]
    u, _, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    expected = -0.5 * 2.0 * (9 / 4) ** 0.5 * (u @ vt) - shrink(params["blocks"]["up"]["kernel"])
    np.testing.assert_allclose(kernel, expected, atol=2e-3)
    bias, g = updates["blocks"]["up"]["bias"], np.asarray(grads["blocks"]["up"]["bias"])
    rms = np.sqrt((g**2).mean(1, keepdims=True))
    expected = -0.5 * 4.0 * g / rms - shrink(params["blocks"]["up"]["bias"])
    np.testing.assert_allclose(bias, expected, rtol=1e-4, atol=1e-5)
    for a, b in (("token_embedding", "embedding"), ("head", "kernel")):  # both of width 4
        expected = -0.5 * 3.0 / 4 * np.sign(grads[a][b]) - shrink(params[a][b])
        np.testing.assert_allclose(updates[a][b], expected, rtol=1e-4)


def test_cautious_updates_by_layer():
    grads = {
        "blocks": {"up": {"bias": jnp.array([[1.0, 1.0, -1.0, 1.0], [1.0, -1.0, -1.0, -1.0]])}}
    }
    tx = cautious(optax.stateless(lambda updates, params: jax.tree.map(jnp.abs, updates)))
    got, _ = tx.update(grads, tx.init(grads), grads)
    expected = np.array([[1, 1, 0, 1], [1, 0, 0, 0]]) * np.array([[4 / 3], [4.0]])
    np.testing.assert_allclose(got["blocks"]["up"]["bias"], expected, rtol=1e-6)


def test_cautious_settings_mask_the_step_and_leave_the_decay():
    """A direction against the gradient is dropped, what decays still decays."""
    params = {"head": {"kernel": jnp.full((1, 2), 2.0)}}
    settings = dataclasses.replace(AdamW(cautious=True, clip_norm=None), learning_rate=1.0)
    tx = build(settings, Constant(), 10, params)
    state = tx.init(params)
    for g in (5.0, -0.1):  # the momentum still says down when the gradient says up
        grads = {"head": {"kernel": jnp.full((1, 2), g)}}
        updates, state = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1 * 2.0, rtol=1e-5)
    careful = dataclasses.replace(settings, cautious=False, cautious_decay=True)
    u = jnp.array([1.0, -1.0, 0.0])
    got, _ = cautious_decayed_weights(0.5).update(u, optax.EmptyState(), jnp.array([2.0, 2.0, 2.0]))
    assert got.tolist() == [2.0, -1.0, 1.0]
    tx = build(careful, Constant(), 10, params)
    down = {"head": {"kernel": jnp.full((1, 2), -1.0)}}
    updates, _ = tx.update(down, tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], 1.0, rtol=1e-4)  # no decay against it


@pytest.mark.parametrize("decay", [None, 0.5])
def test_tail_average(decay):
    tx = optax.chain(optax.scale(-1.0), tail_average(2, decay))
    w, state, seen = jnp.array([1.0]), None, []
    state = tx.init(w)
    for g in (1.0, -2.0, 3.0, 0.5, 4.0):
        updates, state = tx.update(jnp.array([g]), state, w)
        w = optax.apply_updates(w, updates)
        seen.append(float(w[0]))
    expected = seen[2]
    for n, x in enumerate(seen[3:], 2):
        expected += (x - expected) * (1 / n if decay is None else max(1 / n, 1 - decay))
    assert float(averaged(state, w)[0]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="0 averages"):
        averaged(optax.sgd(0.1).init(w), w)


def test_tail_fraction_of_the_settings():
    params = {"head": {"kernel": jnp.zeros((1, 1))}}
    tx = build(Muon(matrix_rules=(("kernel", True),), tail_fraction=0.3), Constant(), 10, params)
    state = tx.init(params)
    weights = params
    update = jax.jit(tx.update)
    kept = []
    for _ in range(10):
        grads = jax.tree.map(jnp.ones_like, weights)
        updates, state = update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        kept.append(float(weights["head"]["kernel"][0, 0]))
    got = float(averaged(state, weights)["head"]["kernel"][0, 0])
    assert got == pytest.approx(np.mean(kept[-3:]), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (Muon, {"newton_schulz_form": "gramm"}, "auto, plain, gram"),
        (Muon, {"newton_schulz_form": "gram", "newton_schulz_dtype": "bfloat16"}, "float32"),
        (Scion, {"sign_radius": 0.0}, "sign_radius"),
        (Scion, {"norm_rules": (("kernel", "nuclear"),)}, "spectral, sign, rms"),
        (AdamMini, {"block_rules": (("kernel", "head"),)}, "neuron, whole"),
        (Mars, {"tail_fraction": 0.0}, "tail_fraction"),
    ],
)
def test_settings_that_do_not_fit(kind, changes, says):
    with pytest.raises(ValueError, match=says):
        kind(**changes)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (Soap, {"frequency": 0}, "frequency"),
        (Shampoo, {"graft": "sgd"}, "adam, none"),
        (Shampoo, {"exponent": 0.0}, "exponent"),
    ],
)
def test_directions_that_do_not_fit(kind, changes, says):
    with pytest.raises(ValueError, match=says):
        kind(**changes).direction()
