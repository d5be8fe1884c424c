"""Optimizers against plain Optax and written-out formulas; clipping and rates by rule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.rules import leaf_paths
from train.optimizers import (
    OPTIMIZERS,
    SGD,
    Adafactor,
    Adam,
    AdamW,
    build,
    learning_rate_at,
    optimizer_named,
)
from train.optimizers.from_optax import FROM_OPTAX
from train.optimizers.table import RATE_GRIDS, VARIANTS, _scaled, at_rate, settings_named
from train.schedules import Constant, Cosine, Linear

LAYERS, VOCABULARY, WIDTH, HIDDEN = 3, 7, 4, 6
STEPS = 10


def shapes(dtype=jnp.float32):
    """The layout of a model, with few leaves of each kind so that it compiles fast."""
    n, d, f = LAYERS, WIDTH, HIDDEN
    layout = {
        "token_embedding": {"embedding": (VOCABULARY, d)},
        "blocks": {
            "attention_norm": {"scale": (n, d)},
            "attention": {"q": {"kernel": (n, d, d), "bias": (n, d)}},
            "mlp": {"down": {"kernel": (n, f, d)}},
        },
        "final_norm": {"scale": (d,)},
        "head": {"kernel": (d, VOCABULARY)},
    }
    is_shape = lambda node: isinstance(node, tuple)
    return jax.tree.map(lambda size: jax.ShapeDtypeStruct(size, dtype), layout, is_leaf=is_shape)


def random_tree(seed, like):
    """Random normal leaves, drawn on the host so that nothing has to be compiled."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like)


def by_path(tree):
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


REFERENCES = {
    "sgd": lambda mask: optax.sgd(0.02, momentum=0.9),
    "adam": lambda mask: optax.adam(0.02),
    "adamw": lambda mask: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(0.02, b2=0.98, weight_decay=0.1, mask=mask),
    ),
    "adamax": lambda mask: optax.adamax(0.02),
    "adamaxw": lambda mask: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamaxw(0.02, weight_decay=0.1, mask=mask)
    ),
    "nadamw": lambda mask: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.nadamw(0.02, b1=0.95, b2=0.98, weight_decay=0.1, mask=mask),
    ),
    "lion": lambda mask: optax.chain(
        optax.clip_by_global_norm(1.0), optax.lion(0.02, b2=0.98, weight_decay=0.6, mask=mask)
    ),
    "adafactor": lambda mask: optax.adafactor(0.02, multiply_by_parameter_scale=False),
    # without Nesterov, which there also holds for its Adam part
    "muon": lambda mask: optax.contrib.muon(
        0.02,
        weight_decay=0.1,
        weight_decay_mask=mask,
        adam_b1=0.8,
        adam_b2=0.98,
        adam_learning_rate=3.2e-3,
        nesterov=False,
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_optax_on_a_simple_tree(name):
    params = {"head": {"kernel": jnp.ones((130, 140)), "bias": jnp.ones((140,))}}
    mask = {"head": {"kernel": True, "bias": False}}
    more = {"matrix_rules": (("kernel", True),), "nesterov": False} if name == "muon" else {}
    settings = dataclasses.replace(OPTIMIZERS[name](), learning_rate=0.02, **more)
    ours = build(settings, Constant(), STEPS, params)
    theirs = REFERENCES[name](mask)

    def run_with(tx):
        def step(carry, grads):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), updates

        grads = [random_tree(i, params) for i in range(4)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
        return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), stacked)[1])()

    got, expected = run_with(ours), run_with(theirs)
    for path, update in by_path(got).items():
        # Orthogonalisation mixes all elements of a matrix: small ones have the rounding of the
        # others, which are 1e-2.
        np.testing.assert_allclose(
            update, by_path(expected)[path], rtol=2e-5, atol=1e-7, err_msg=path
        )


def test_adafactor_decays_with_the_learning_rate():
    """As `optax.adafactor` does when its decay is a schedule: rate times decay."""
    params = {"head": {"kernel": random_tree(0, jnp.zeros((4, 5)))}}
    grads = {"head": {"kernel": random_tree(1, jnp.zeros((4, 5)))}}
    ours = build(Adafactor(learning_rate=0.5, weight_decay=0.2), Linear(), STEPS, params)
    rate = Linear().build(0.5, STEPS)
    theirs = optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        weight_decay_rate=lambda step: 0.2 * rate(step),
    )
    states = ours.init(params), theirs.init(params)
    for _ in range(3):
        got, ours_state = ours.update(grads, states[0], params)
        expected, theirs_state = theirs.update(grads, states[1], params)
        states = ours_state, theirs_state
        np.testing.assert_allclose(
            got["head"]["kernel"], expected["head"]["kernel"], rtol=1e-5, atol=1e-7
        )


def test_adafactor_moves_weights_that_start_at_zero():
    params = {"head": {"kernel": jnp.zeros((4, 5))}}
    tx = build(Adafactor(learning_rate=0.5), Constant(), STEPS, params)
    grads = {"head": {"kernel": jnp.ones((4, 5))}}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.5, rtol=1e-5)


def test_adafactor_sees_each_layer_by_itself():
    """A layer with a gradient a thousand times larger leaves the other layers' updates alone."""
    like = {"blocks": {"up": {"kernel": jnp.zeros((2, 8, 8)), "bias": jnp.zeros((2, 8))}}}
    settings = Adafactor(learning_rate=1.0, min_dim_size_to_factor=2)
    tx = build(settings, Constant(), STEPS, like)
    params, grads = random_tree(0, like), random_tree(1, like)
    loud = jax.tree.map(lambda g: g.at[1].multiply(1000.0), grads)
    update, start = jax.jit(tx.update), jax.jit(tx.init)(params)
    quiet_updates, state = update(grads, start, params)
    loud_updates, _ = update(loud, start, params)
    for quiet, after in zip(*map(jax.tree.leaves, (quiet_updates, loud_updates)), strict=True):
        np.testing.assert_allclose(quiet[0], after[0], rtol=1e-5)
    # factored by row and column within a layer, and biases not across layers
    sizes = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim > 1)
    assert sizes.count((2, 8)) == 3  # rows, columns, and the whole moment of the bias
    assert (2, 8, 8) not in sizes


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_weight_decay_goes_through_the_momentum(nesterov):
    """Against the recurrence written out, with a rate that decays as 1 / (1 + t)."""
    settings = SGD(learning_rate=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0.2)
    params = {"head": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([2.0])}}
    tx = build(settings, Linear(), STEPS, params)
    rate = Linear().build(0.1, STEPS)
    state = tx.init(params)
    weights = {"kernel": 2.0, "bias": 2.0}
    momentum = {"kernel": 0.0, "bias": 0.0}
    for step in range(4):
        grads = jax.tree.map(lambda p, i=step: jnp.full_like(p, 0.3 + i), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for key, decay in (("kernel", 0.2), ("bias", 0.0)):
            g = 0.3 + step + decay * weights[key]
            momentum[key] = 0.5 * momentum[key] + g
            direction = g + 0.5 * momentum[key] if nesterov else momentum[key]
            weights[key] -= float(rate(step)) * direction
            assert float(params["head"][key].squeeze()) == pytest.approx(weights[key], rel=1e-5)


def test_sgd_without_momentum_keeps_no_momentum():
    tx = build(SGD(momentum=0.0), Constant(), STEPS, shapes())
    assert all(leaf.ndim == 0 for leaf in jax.tree.leaves(jax.eval_shape(tx.init, shapes())))


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_clipping_bounds_the_global_norm_and_leaves_smaller_gradients(scale):
    settings = SGD(learning_rate=1.0, momentum=0.0, clip_norm=2.0)
    params = random_tree(0, shapes())
    grads = jax.tree.map(lambda g: g * scale, random_tree(1, params))
    tx = build(settings, Constant(), STEPS, params)
    updates, _ = jax.jit(lambda: tx.update(grads, tx.init(params), params))()
    norm = jax.jit(optax.tree.norm)(grads)
    factor = jnp.minimum(1.0, 2.0 / norm)
    assert (norm > 2.0) == (scale > 1)
    for path, update in by_path(updates).items():
        np.testing.assert_allclose(update, -factor * by_path(grads)[path], rtol=1e-5, err_msg=path)


def test_learning_rate_at_is_the_rate_of_the_updates():
    settings = SGD(learning_rate=0.7, momentum=0.0)
    schedule = Cosine(warmup_steps=3, final_fraction=0.1)
    params = {"head": {"kernel": jnp.zeros((1, 1))}}
    tx = build(settings, schedule, STEPS, params)
    rate = learning_rate_at(settings, schedule, STEPS)
    state = tx.init(params)
    for step in range(STEPS):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        assert float(updates["head"]["kernel"][0, 0]) == pytest.approx(-float(rate(step)))


@pytest.mark.parametrize("name", ["adamw", "muon"])  # the same last stage for all
def test_learning_rate_rules_scale_updates_by_group_and_layer(name):
    rules = (("blocks/0/attention", 0.0), ("blocks/2", 3.0), ("head", 0.5), ("blocks", 1.0))
    params, grads = random_tree(0, shapes()), random_tree(1, shapes())

    def updates_with(settings):
        tx = build(settings, Cosine(warmup_steps=2), STEPS, params)
        return jax.jit(lambda: tx.update(grads, tx.init(params), params)[0])()

    plain = updates_with(OPTIMIZERS[name]())
    updates = updates_with(OPTIMIZERS[name](learning_rate_rules=rules))
    for path, got in by_path(updates).items():
        factors = 1.0
        if path.startswith("blocks"):
            first = 0.0 if path.startswith("blocks/attention/") else 1.0
            factors = np.array([first, 1.0, 3.0]).reshape(3, *[1] * (got.ndim - 1))
        elif path.startswith("head"):
            factors = 0.5
        np.testing.assert_allclose(
            got, by_path(plain)[path] * factors, rtol=1e-5, atol=1e-9, err_msg=path
        )


def test_learning_rate_rules_survive_strict_promotion_and_bfloat16(strict):
    update = jnp.ones((2, 3, 4), jnp.bfloat16)
    assert _scaled(update, 0.3).dtype == jnp.bfloat16
    by_layer = _scaled(update, (0.5, 2.0))
    assert by_layer.dtype == jnp.bfloat16
    assert by_layer[:, 0, 0].tolist() == [0.5, 2.0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_moments_forget_in_few_bits(dtype):
    """A gradient of 1 for 1,000 updates, then one of a tenth: the update goes back to the rate."""
    params = {"w": {"kernel": jnp.ones((1, 1), dtype)}}
    tx = build(Adam(learning_rate=1.0, b2=0.999), Constant(), 10, params)

    def run(state, g, steps):
        def step(state, _):
            updates, state = tx.update({"w": {"kernel": jnp.full((1, 1), g, dtype)}}, state, params)
            return state, updates["w"]["kernel"]

        return jax.lax.scan(step, state, None, steps)

    @jax.jit
    def last(state):
        state, _ = run(state, 1.0, 1000)
        return run(state, 0.1, 7000)[1][-1]

    assert float(last(tx.init(params))[0, 0]) == pytest.approx(-1.0, rel=0.1)


@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_norms_of_float16_are_taken_in_float32(size):
    params = {"w": {"kernel": jnp.ones((64, 8), jnp.float16)}}
    tx = build(SGD(learning_rate=1.0, momentum=0.0, clip_norm=1e-3), Constant(), 10, params)
    grads = {"w": {"kernel": jnp.full((64, 8), size, jnp.float16)}}
    updates, _ = tx.update(grads, tx.init(params), params)
    norm = np.linalg.norm(np.asarray(updates["w"]["kernel"], np.float64))
    assert norm == pytest.approx(1e-3, rel=0.01)


def test_decay_reaches_the_factors_of_kernels():
    """Of low rank, under optimizers from Optax as under ours."""
    params = {"up": {"kernel": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}}, "bias": jnp.ones(4)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for name in ("lamb", "adan", "adamw"):
        settings = dataclasses.replace(OPTIMIZERS[name](), weight_decay=0.5)
        tx = build(settings, Constant(), 10, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        assert float(updates["up"]["kernel"]["a"][0, 0]) < 0, name
        assert float(updates["bias"][0]) == 0, name


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("adam", {"b2": 1.0}, "b2"),
        ("adam", {"eps": 0.0}, "eps"),
        ("sgd", {"momentum": -0.1}, "momentum"),
        ("sgd", {"momentum": 0.0, "nesterov": True}, "nesterov has no effect"),
        ("adafactor", {"clipping_threshold": 0.5}, "clipping_threshold"),
        ("adafactor", {"decay_rate": 0.0}, "decay_rate"),
    ],
)
def test_settings_out_of_range_are_refused(name, changes, says):
    with pytest.raises(ValueError, match=says):
        OPTIMIZERS[name](**changes)


def test_a_learning_rate_rule_that_matches_nothing_is_refused():
    settings = Adam(learning_rate_rules=(("heads", 2.0),))
    with pytest.raises(ValueError, match="no parameter matches 'heads'"):
        build(settings, Constant(), STEPS, shapes())


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="'adamv'") as error:
        optimizer_named("adamv")
    assert all(name in str(error.value) for name in OPTIMIZERS)
    assert optimizer_named("adamw") is AdamW


def test_every_optimizer_has_a_grid_of_rates_around_its_own():
    assert RATE_GRIDS.keys() == OPTIMIZERS.keys() | VARIANTS.keys()
    for name, rates in RATE_GRIDS.items():
        assert len(rates) == 5
        assert rates == tuple(sorted(set(rates)))
        assert at_rate(name, rates[0]).learning_rate == rates[0]
        assert rates[2] == pytest.approx(settings_named(name).learning_rate, rel=1e-2)


@pytest.mark.variants(1)
@pytest.mark.parametrize("name", ["lamb", "adan", "yogi", "ademamix", "madgrad", "sm3"])
def test_settings_made_from_optax_give_what_optax_gives(name):
    """On parameters without layers; with the decay, which kernels alone have."""
    params = {"head": {"kernel": random_tree(0, jnp.ones((3, 4))), "bias": jnp.ones((4,))}}
    kind = FROM_OPTAX[name]
    decay = {"weight_decay": 0.2} if hasattr(kind, "weight_decay") else {}
    more = {"mask": {"head": {"kernel": True, "bias": False}}} if decay else {}
    function = getattr(optax, name, None) or getattr(optax.contrib, name)
    theirs = function(0.05, **decay, **more)
    ours = build(kind(learning_rate=0.05, **decay), Constant(), STEPS, params)
    states = ours.init(params), theirs.init(params)
    for step in range(3):
        grads = random_tree(1 + step, params)
        got, one = ours.update(grads, states[0], params)
        expected, two = theirs.update(grads, states[1], params)
        states = one, two
    for path, update in by_path(got).items():
        np.testing.assert_allclose(update, by_path(expected)[path], rtol=1e-5, err_msg=path)
