"""What every optimizer by name promises to the training step."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.rules import leaf_paths
from train.optimizer_settings import DecayingSettings
from train.optimizers import OPTIMIZERS, build
from train.schedules import Constant, Cosine, Linear

LAYERS, VOCABULARY, WIDTH, HIDDEN = 3, 7, 4, 6
STEPS = 10

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_decaying_optimizer = pytest.mark.parametrize(
    "name", [name for name, kind in OPTIMIZERS.items() if issubclass(kind, DecayingSettings)]
)


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


@functools.cache
def optimizer(name, dtype=jnp.float32):
    """(transformation, jitted update) under the default settings, shared by the tests."""
    tx = build(OPTIMIZERS[name](), Cosine(warmup_steps=2), STEPS, shapes(dtype))
    return tx, jax.jit(tx.update)


def run(name, steps, state=None, params=None, first=0):
    """Updates with gradients that are a function of the step."""
    tx, update = optimizer(name)
    params = random_tree(0, shapes()) if params is None else params
    state = jax.jit(tx.init)(params) if state is None else state
    for step in range(first, first + steps):
        updates, state = update(random_tree(1 + step, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def by_path(tree):
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def assert_identical(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@every_optimizer
def test_learns_a_quadratic_problem_with_one_compilation_and_donated_state(name):
    changes = {"learning_rate": 0.05 if name in ("sgd", "lion") else 0.1}
    if name == "muon":
        changes["adam_learning_rate"] = 0.1
    settings = dataclasses.replace(OPTIMIZERS[name](), **changes)
    if isinstance(settings, DecayingSettings):
        settings = dataclasses.replace(settings, weight_decay=0.0)
    tx = build(settings, Linear(), 100, shapes())
    target = random_tree(1, shapes())
    curvature = jax.tree.map(np.exp, random_tree(2, shapes()))
    traces = []

    def loss(params):
        terms = jax.tree.map(lambda c, p, t: jnp.sum(c * (p - t) ** 2), curvature, params, target)
        return 0.5 * sum(jax.tree.leaves(terms))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        traces.append(None)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, grads=grads)
        return optax.apply_updates(params, updates), state, value

    params = random_tree(0, shapes())
    state = jax.jit(tx.init)(params)
    types = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    losses = []
    for _ in range(100):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert len(traces) == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == types
    assert losses[-1] < 0.05 * losses[0]
    # every leaf had its part in it
    start = by_path(random_tree(0, shapes()))
    for path, end in by_path(target).items():
        before, after = start[path] - end, by_path(params)[path] - end
        assert np.linalg.norm(after) < 0.6 * np.linalg.norm(before), path


@every_optimizer
def test_the_extra_arguments_of_the_step_change_nothing(name):
    tx, _ = optimizer(name)
    params = random_tree(0, shapes())
    state = jax.eval_shape(tx.init, params)
    plain = jax.make_jaxpr(lambda s: tx.update(params, s, params))(state)
    extra = {"value": np.float32(1), "grads": jax.tree.map(np.zeros_like, params)}
    ignoring = jax.make_jaxpr(lambda s: tx.update(params, s, params, **extra))(state)
    assert str(plain) == str(ignoring)


@every_optimizer
def test_the_state_is_a_plain_pytree_that_goes_on_bitwise_from_the_host(name):
    params, state = run(name, 2)
    leaves, treedef = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    restored = jax.tree.unflatten(treedef, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)
    assert_identical(run(name, 2, restored, params, first=2), run(name, 4))


@every_optimizer
def test_parameters_in_bfloat16_stay_so(name):
    tx, _ = optimizer(name, jnp.bfloat16)
    params = shapes(jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert dtypes(new_state) == dtypes(state)


@pytest.mark.parametrize("name", ["adafactor", "muon"])  # the ones with more than products
def test_updates_in_bfloat16_are_near_those_in_float32(name):
    updates = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        tx, update = optimizer(name, dtype)
        params = random_tree(0, shapes(dtype))
        updates[dtype], _ = update(random_tree(1, params), jax.jit(tx.init)(params), params)
    for path, exact in by_path(updates[jnp.float32]).items():
        error = np.float32(by_path(updates[jnp.bfloat16])[path]) - exact
        # 2**-8 to each of the dozens of roundings of five Newton-Schulz steps
        assert np.linalg.norm(error) < 0.1 * np.linalg.norm(exact), path


@every_optimizer
def test_without_a_gradient_exactly_the_matrices_decay(name):
    settings = OPTIMIZERS[name]()
    rates = {"learning_rate": 0.5}
    if isinstance(settings, DecayingSettings):
        rates["weight_decay"] = 0.1
    if name == "muon":
        rates |= {"adam_learning_rate": 0.25, "adam_weight_decay": 0.3}
    tx = build(dataclasses.replace(settings, **rates), Constant(), STEPS, shapes())
    params = random_tree(0, shapes())
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda: tx.update(zeros, tx.init(params), params))()
    for path, update in by_path(updates).items():
        factor = 0.0
        if path.endswith(("kernel", "embedding")) and isinstance(settings, DecayingSettings):
            muon_leaves_it = name == "muon" and not path.startswith("blocks")
            factor = -0.25 * 0.3 if muon_leaves_it else -0.5 * 0.1
        np.testing.assert_allclose(update, factor * by_path(params)[path], rtol=1e-5, err_msg=path)


@every_decaying_optimizer
def test_decay_rules_choose_what_decays(name):
    params = {
        "blocks": {"up": {"kernel": jnp.ones((2, 3, 3))}},
        "final_norm": {"scale": jnp.ones(3)},
    }
    settings = dataclasses.replace(
        OPTIMIZERS[name](), decay_rules=(("final_norm/scale", True),), weight_decay=0.1
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
        off = {"weight_decay": 0.0} | ({"adam_weight_decay": 0.0} if name == "muon" else {})
        build(dataclasses.replace(wrong, **off), Constant(), STEPS, params)


@every_optimizer
def test_optax_finds_the_parameters_in_the_state(name):
    """Placement lays the optimizer's state out like the parameters through this function."""
    tx, _ = optimizer(name)
    paths = jax.tree_util.tree_unflatten(jax.tree.structure(shapes()), leaf_paths(shapes()))
    state = jax.eval_shape(tx.init, shapes())
    labelled = optax.tree_map_params(
        tx,
        lambda leaf, path: path,
        state,
        paths,
        transform_non_params=lambda leaf: None,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    found = [leaf for leaf in jax.tree.leaves(labelled) if isinstance(leaf, str)]
    assert set(found) == set(leaf_paths(shapes()))


@every_optimizer
def test_the_head_may_be_tied_away(name):
    tied = {key: value for key, value in shapes().items() if key != "head"}
    tx = build(OPTIMIZERS[name](), Constant(), STEPS, tied)
    jax.eval_shape(tx.init, tied)
