"""Muon on stacked kernels: what is orthogonalised, each layer by itself, and what AdamW keeps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.rules import leaf_paths
from train.optimizers import build
from train.optimizers.muon import Muon, scale_by_orthogonal_momentum
from train.optimizers.orthogonal import coefficients_named
from train.schedules import Constant, Linear

STEPS = 10


def normal(seed, *sizes):
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes), jnp.float32)


def model(layers=3, width=8, hidden=24, vocabulary=11):
    return {
        "token_embedding": {"embedding": normal(0, vocabulary, width)},
        "blocks": {
            "attention": {
                "q": {"kernel": normal(1, layers, width, width), "bias": normal(2, layers, width)}
            },
            "mlp": {
                "up": {"kernel": normal(3, layers, width, hidden)},
                "down": {"kernel": normal(4, layers, hidden, width)},
            },
        },
        "final_norm": {"scale": normal(5, width)},
        "head": {"kernel": normal(6, width, vocabulary)},
    }


def gradients(step, params):
    leaves, treedef = jax.tree.flatten(params)
    draws = [normal(100 * step + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, draws)


def updates_of(settings, params, schedule=None, steps=3):
    """The last of several updates, the parameters held where they are."""
    tx = build(settings, schedule or Constant(), STEPS, params)
    update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    for step in range(steps):
        updates, state = update(gradients(step, params), state, params)
    return updates, state


def by_path(tree):
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def singular_values(matrices):
    return np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)


@pytest.fixture(scope="module")
def params():
    return model()


@pytest.fixture(scope="module")
def bare():
    """No decay and rates of 1, so that an update is minus the orthogonalised momentum."""
    return Muon(learning_rate=1.0, weight_decay=0.0, adam_learning_rate=1.0, adam_weight_decay=0.0)


def test_singular_values_of_kernel_updates_are_near_the_scale_by_shape(params, bare):
    updates, _ = updates_of(bare, params, steps=1)
    grads = by_path(gradients(0, params))
    for path, update in by_path(updates).items():
        if path.startswith("blocks") and path.endswith("kernel"):
            rows, columns = update.shape[1:]
            values = singular_values(update) / max(1.0, columns / rows) ** 0.5
            # Jordan's coefficients leave them about 0.7 to 1.2; a raw gradient has 0.2 to 8 here
            assert values.min() > 0.5, path
            assert values.max() < 1.3, path
            assert np.vdot(update, grads[path]) < 0, path  # downhill


def test_no_kernel_outside_the_blocks_is_orthogonalised(params, bare):
    updates, _ = updates_of(bare, params)
    for path in ("token_embedding/embedding", "head/kernel"):
        values = singular_values(by_path(updates)[path])
        assert values.max() > 1.5, path


def test_consistent_rms_gives_updates_the_root_mean_square_asked_for(params, bare):
    updates, _ = updates_of(dataclasses.replace(bare, consistent_rms=0.2), params)
    for name in ("up", "down"):
        update = updates["blocks"]["mlp"][name]["kernel"]
        scaled = singular_values(update) / (0.2 * 24**0.5)
        assert 0.5 < scaled.min() < scaled.max() < 1.3
        rms = np.sqrt(np.mean(np.square(update), axis=(1, 2)))
        np.testing.assert_allclose(rms, 0.2, rtol=0.2)


def test_coefficients_that_change_by_step_come_closer_to_one(params, bare):
    spread = {}
    for name in ("standard", "dion"):
        settings = dataclasses.replace(bare, newton_schulz_coefficients=name)
        kernel = updates_of(settings, params)[0]["blocks"]["mlp"]["down"]["kernel"]
        spread[name] = np.abs(singular_values(kernel) - 1).max()
    assert spread["dion"] < spread["standard"]


@pytest.mark.parametrize("nesterov", [False, True])
def test_each_layer_gets_what_optax_gives_it_alone(params, nesterov):
    settings = Muon(learning_rate=0.1, momentum=0.9, nesterov=nesterov)
    tx = build(settings, Linear(), STEPS, params)
    alone = optax.contrib.muon(
        Linear().build(0.1, STEPS), beta=0.9, nesterov=nesterov, weight_decay=0.1
    )
    layer = lambda tree, i: {
        path: leaf[i]
        for path, leaf in by_path(tree).items()
        if path.startswith("blocks") and path.endswith("kernel")
    }
    state = tx.init(params)
    states = [alone.init(layer(params, i)) for i in range(3)]
    update, update_alone = jax.jit(tx.update), jax.jit(alone.update)
    for step in range(3):
        grads = gradients(step, params)
        stacked, state = update(grads, state, params)
        for i in range(3):
            expected, states[i] = update_alone(layer(grads, i), states[i], layer(params, i))
            for path, got in layer(stacked, i).items():
                np.testing.assert_allclose(got, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_everything_else_gets_adamw_at_its_own_rate(params):
    settings = Muon(adam_learning_rate=0.02, adam_weight_decay=0.3, nesterov=True)
    updates, _ = updates_of(settings, params, Linear())
    rest = {
        path: leaf
        for path, leaf in by_path(params).items()
        if not (path.startswith("blocks") and path.endswith("kernel"))
    }
    assert set(rest) == {
        "token_embedding/embedding",
        "blocks/attention/q/bias",
        "final_norm/scale",
        "head/kernel",
    }
    adamw = optax.adamw(
        Linear().build(0.02, STEPS),
        b1=0.8,
        b2=0.98,
        weight_decay=0.3,
        mask={path: path in ("token_embedding/embedding", "head/kernel") for path in rest},
    )
    state = adamw.init(rest)
    for step in range(3):
        grads = by_path(gradients(step, params))
        expected, state = adamw.update({path: grads[path] for path in rest}, state, rest)
    for path, update in expected.items():
        np.testing.assert_allclose(by_path(updates)[path], update, rtol=1e-5, err_msg=path)


def test_the_size_of_a_gradient_does_not_matter_to_muon(params, bare):
    tx = build(bare, Constant(), STEPS, params)
    update = jax.jit(tx.update)
    grads = gradients(0, params)
    # powers of two change no rounding but that of the divisor's tiny epsilon
    loud = jax.tree.map(lambda g: g * 1024.0, grads)
    one, _ = update(grads, tx.init(params), params)
    other, _ = update(loud, tx.init(params), params)
    for name in ("up", "down"):
        np.testing.assert_allclose(
            one["blocks"]["mlp"][name]["kernel"],
            other["blocks"]["mlp"][name]["kernel"],
            rtol=1e-4,
            atol=1e-6,
        )


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_momentum_rises_in_a_line(nesterov):
    """Against the recursion in float64, and the exact polar factor of what it gives."""
    grads = [np.random.default_rng(n).normal(size=(2, 4, 6)) for n in range(6)]
    tx = scale_by_orthogonal_momentum(
        coefficients_named("exact", 20), 0.9, nesterov=nesterov, warmup=(0.5, 4)
    )
    state = tx.init(jnp.zeros((2, 4, 6)))
    mu, left = np.zeros((2, 4, 6)), 1.0  # left: the weight of the zero at the start
    for n, grad in enumerate(grads):
        update, state = jax.jit(tx.update)(jnp.asarray(grad, jnp.float32), state)
        b, following = (0.5 + 0.1 * min(m, 4) for m in (n, n + 1))
        mu, left = b * mu + (1 - b) * grad, left * b
        ahead = b * mu / (1 - left * following) + (1 - b) * grad / (1 - left)
        u, _, v = np.linalg.svd(ahead if nesterov else mu, full_matrices=False)
        np.testing.assert_allclose(update, u @ v, atol=2e-3)
        np.testing.assert_allclose(state.mu, mu, atol=1e-6)


def test_a_momentum_that_rises_keeps_the_type_of_its_memory():
    tx = scale_by_orthogonal_momentum(coefficients_named("standard", 5), 0.9, warmup=(0.5, 4))
    params = jnp.ones((4, 6), jnp.bfloat16)
    before = tx.init(params)
    updates, after = tx.update(params, before)
    assert updates.dtype == jnp.bfloat16
    assert jax.tree.map(jnp.dtype, after) == jax.tree.map(jnp.dtype, before)


def test_axes_before_the_last_two_are_matrices_of_their_own(bare):
    experts = {"blocks": {"experts": {"kernel": normal(0, 2, 3, 4, 6)}}}
    flat = {
        "blocks": {"experts": {"kernel": experts["blocks"]["experts"]["kernel"].reshape(6, 4, 6)}}
    }
    one, _ = updates_of(bare, experts, steps=1)
    tx = build(bare, Constant(), STEPS, flat)
    grads = jax.tree.map(lambda g: g.reshape(6, 4, 6), gradients(0, experts))
    other, _ = jax.jit(tx.update)(grads, tx.init(flat), flat)
    np.testing.assert_allclose(
        one["blocks"]["experts"]["kernel"].reshape(6, 4, 6),
        other["blocks"]["experts"]["kernel"],
        rtol=1e-4,
        atol=1e-6,
    )


def test_matrix_rules_move_parameters_between_the_parts(params, bare):
    rules = (("mlp/up/kernel", False), ("blocks/.*/kernel|head", True))
    updates, _ = updates_of(dataclasses.replace(bare, matrix_rules=rules), params)
    head = singular_values(updates["head"]["kernel"]) / (11 / 8) ** 0.5
    assert 0.5 < head.min() < head.max() < 1.3
    assert singular_values(updates["blocks"]["mlp"]["up"]["kernel"]).max() > 3.0


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ((("blocks/.*", True),), "'blocks/attention/q/bias' of shape \\(3, 8\\) is none"),
        ((("final_norm", True),), "'final_norm/scale'"),
        ((("blocks/0/.*/kernel", True),), "layer number"),
        ((("blocks/.*/weight", True),), "no parameter matches"),
    ],
)
def test_rules_that_cannot_hold_are_refused(params, rules, says):
    with pytest.raises(ValueError, match=says):
        build(Muon(matrix_rules=rules), Constant(), STEPS, params)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"newton_schulz_coefficients": "muon"}, "standard, dion, polar_express"),
        ({"newton_schulz_coefficients": "dion", "newton_schulz_steps": 6}, "between 1 and 5"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps"),
        ({"preconditioning": "none"}, "frobenius, spectral"),
        ({"consistent_rms": 0.0}, "consistent_rms"),
        ({"adam_learning_rate": -1.0}, "adam_learning_rate"),
        ({"adam_b1": 1.0}, "adam_b1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        Muon(**changes)
