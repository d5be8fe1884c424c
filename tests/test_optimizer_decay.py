"""Which parameters weight decay shrinks, and by how much, whatever the optimizer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_optimizer_contract import NAMES, STEPS, by_path, random_tree, settings_of, shapes
from train.optimizers import build
from train.optimizers.matrix import MatrixSettings
from train.optimizers.scion import Scion
from train.optimizers.settings import DecayingSettings
from train.schedules import Constant

every_decaying_optimizer = pytest.mark.parametrize(
    "name",
    [
        name
        for name in NAMES
        if isinstance(settings_of(name), DecayingSettings) and name not in ("adamh", "muonh")
    ],
)


@pytest.mark.variants(4)
@every_decaying_optimizer
def test_without_a_gradient_exactly_the_matrices_decay(name):
    settings = settings_of(name)
    rates = {"learning_rate": 0.5, "weight_decay": 0.1}
    if isinstance(settings, MatrixSettings):
        rates |= {"adam_learning_rate": 0.25, "adam_weight_decay": 0.3}
    tx = build(dataclasses.replace(settings, **rates), Constant(), STEPS, shapes())
    params = random_tree(0, shapes())
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda: tx.update(zeros, tx.init(params), params))()
    for path, update in by_path(updates).items():
        factor = 0.0
        if path.endswith(("kernel", "embedding")):
            left = isinstance(settings, MatrixSettings) and not path.startswith("blocks")
            factor = -0.25 * 0.3 if left and name != "mars" else -0.5 * 0.1
        np.testing.assert_allclose(update, factor * by_path(params)[path], rtol=1e-5, err_msg=path)


@pytest.mark.variants(3)
@every_decaying_optimizer
def test_decay_rules_choose_what_decays(name):
    params = {
        "blocks": {"up": {"kernel": jnp.ones((2, 3, 3))}},
        "final_norm": {"scale": jnp.ones(3)},
    }
    settings = dataclasses.replace(
        settings_of(name), decay_rules=(("final_norm/scale", True),), weight_decay=0.1
    )
    tx = build(settings, Constant(), STEPS, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda: tx.update(zeros, tx.init(params), params))()
    decayed = [path for path, update in by_path(updates).items() if jnp.any(update != 0)]
    assert decayed == ["final_norm/scale"]
    for rules, says in [
        ((("kernels", True),), "no parameter matches"),
        ((("blocks/0/.*", True),), "layer number"),
    ]:
        wrong = dataclasses.replace(settings, decay_rules=rules)
        with pytest.raises(ValueError, match=says):
            build(wrong, Constant(), STEPS, params)
        # without a decay there is nothing that the rules could fail to do
        off = {"weight_decay": 0.0} | (
            {"adam_weight_decay": 0.0} if isinstance(settings, MatrixSettings) else {}
        )
        build(dataclasses.replace(wrong, **off), Constant(), STEPS, params)


def test_caution_is_not_of_the_pull_into_the_ball():
    """Scion, constrained: all weights shrink by the rate, whatever the step's direction."""
    params = {"head": {"kernel": jnp.array([[1.0, -1.0], [1.0, -1.0]])}}
    grads = {"head": {"kernel": jnp.array([[1.0, 1.0], [-1.0, -1.0]])}}
    settings = Scion(
        learning_rate=0.1,
        norm_rules=(("head", "sign"),),
        sign_radius=1e-6,
        constrained=True,
        cautious=True,
        clip_norm=None,
    )
    tx = build(settings, Constant(), STEPS, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(
        updates["head"]["kernel"], -0.1 * params["head"]["kernel"], atol=1e-6
    )
