"""What every optimizer by name promises to the training step.

Of hyper-parameters the rate alone may be injected: settings check the others as plain numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.rules import leaf_paths
from train.optimizers import OPTIMIZERS, build
from train.optimizers.from_optax import LEFT_OUT, OptaxSettings
from train.optimizers.matrix import MatrixSettings
from train.optimizers.settings import DecayingSettings
from train.optimizers.table import VARIANTS, settings_named
from train.schedules import Constant, Cosine, Linear

LAYERS, VOCABULARY, WIDTH, HIDDEN = 3, 7, 4, 6
STEPS = 10

# The first ones, each of another kind, are tried by `make test`.
FIRST = ("muon", "soap", "adam_mini", "lion")
GRAM = "muon, Gram-Newton-Schulz"  # which no matrix here is wide enough for by itself
EVERY = (*OPTIMIZERS, *VARIANTS, GRAM)
NAMES = [*FIRST, *(name for name in EVERY if name not in FIRST)]
# What happens every so many updates, or at their end, happens within the few that there are here.
SOON = {
    "soap": {"frequency": 2},
    "shampoo": {"frequency": 2},
    "adamw, tail average": {"tail_fraction": 1.0},
    GRAM: {"newton_schulz_form": "gram"},
}
# What the rate must be, times that of the settings, for a problem with steps of size one.
RATES = {"sgd": 0.05, "lion": 0.05, "signum": 0.05, "scion": 2e-3, "adagrad": 1.0}
NEEDS_VALUE = ("polyak_sgd", "momo", "momo_adam")
STATELESS = ("fromage", "polyak_sgd")  # but for a count
# These begin with steps of 1e-6 by design, or with a memory of thousands of updates.
SLOW = (
    "dadapt_adamw",
    "dog",
    "dowg",
    "prodigy",
    "adadelta",
    "simplified_ademamix",
    "sm3",
    "lars",
    "radam",
    "momo_adam",
)
# An update of these is the way to a point made in three operations, rounded as the weights are.
BETWEEN_POINTS = ("cocob", "madgrad")
VALUE = jnp.float32(3.0)


def settings_of(name):
    """Settings of an optimizer by name, for a test of a few updates."""
    return dataclasses.replace(
        settings_named("muon" if name == GRAM else name), **SOON.get(name, {})
    )


def every_optimizer(number):
    """Over all optimizers, the first few of them in `make test`."""

    def mark(test):
        return pytest.mark.variants(number)(pytest.mark.parametrize("name", NAMES)(test))

    return mark


def test_what_optax_has_is_in_the_table_or_left_out_for_a_reason():
    """Every alias of Optax by its name; new ones must be looked at."""
    named = " ".join(LEFT_OUT).replace(",", " ").split()
    known = {*OPTIMIZERS, *named, "adamaxw", "adamw"}
    # Variants of those, or parts of them.
    known |= {"schedule_free_adamw", "schedule_free_sgd", "optimistic_adam_v2"}
    aliases = {
        name
        for module in (optax, optax.contrib)
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and "learning_rate" in inspect.signature(function).parameters
        and not name.startswith(("scale_by", "_"))
    }
    assert len(aliases) > 30
    assert aliases <= known, aliases - known


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
    tx = build(settings_of(name), Cosine(warmup_steps=2), STEPS, shapes(dtype))
    return tx, jax.jit(functools.partial(tx.update, value=VALUE))


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


@every_optimizer(1)
def test_learns_a_quadratic_problem_with_one_compilation_and_donated_state(name):
    settings = settings_of(name)
    raised = name not in NEEDS_VALUE and settings.learning_rate < 0.1
    if raised or not isinstance(settings, OptaxSettings) or name in RATES:
        settings = dataclasses.replace(settings, learning_rate=RATES.get(name, 0.1))
    if isinstance(settings, MatrixSettings):
        settings = dataclasses.replace(settings, adam_learning_rate=0.1)
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
    if name in SLOW:
        assert losses[-1] < losses[0]
        return
    if name in ("adamh", "muonh"):  # the target of their kernels is on another sphere
        assert losses[-1] < 0.8 * losses[0]
        return
    assert losses[-1] < 0.05 * losses[0]
    # every leaf had its part in it
    start = by_path(random_tree(0, shapes()))
    for path, end in by_path(target).items():
        before, after = start[path] - end, by_path(params)[path] - end
        assert np.linalg.norm(after) < 0.6 * np.linalg.norm(before), path


@every_optimizer(3)
def test_the_extra_arguments_of_the_step_change_nothing(name):
    tx, _ = optimizer(name)
    params = random_tree(0, shapes())
    state = jax.eval_shape(tx.init, params)
    value = {"value": VALUE} if name in NEEDS_VALUE else {}
    plain = jax.make_jaxpr(lambda s: tx.update(params, s, params, **value))(state)
    extra = {"value": VALUE, "grads": jax.tree.map(np.zeros_like, params)}
    ignoring = jax.make_jaxpr(lambda s: tx.update(params, s, params, **extra))(state)
    assert str(plain) == str(ignoring)


@every_optimizer(2)
def test_the_state_is_a_plain_pytree_that_goes_on_bitwise_from_the_host(name):
    params, state = run(name, 2)
    leaves, treedef = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    restored = jax.tree.unflatten(treedef, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)
    assert_identical(run(name, 2, restored, params, first=2), run(name, 4))


@every_optimizer(3)
def test_parameters_in_bfloat16_stay_so(name):
    tx, _ = optimizer(name, jnp.bfloat16)
    params = shapes(jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    update = functools.partial(tx.update, value=VALUE)
    updates, new_state = jax.eval_shape(update, params, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert dtypes(new_state) == dtypes(state)


@every_optimizer(1)
def test_updates_in_bfloat16_are_near_those_in_float32(name):
    updates = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        tx, update = optimizer(name, dtype)
        params = random_tree(0, shapes(dtype))
        state = jax.jit(tx.init)(params)
        for step in range(2 if name == "adopt" else 1):  # whose first update is none
            updates[dtype], state = update(random_tree(1 + step, params), state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates[dtype])} == {jnp.dtype(dtype)}
    for path, exact in by_path(updates[jnp.float32]).items():
        error = np.float32(by_path(updates[jnp.bfloat16])[path]) - exact
        assert np.linalg.norm(exact) > 0.0, path
        # 2**-8 to each of the dozens of roundings of, say, five Newton-Schulz steps
        allowed = 0.1 * np.linalg.norm(exact)
        if name in BETWEEN_POINTS:
            allowed += 3 * 2**-9 * np.linalg.norm(np.float32(by_path(params)[path]))
        assert np.linalg.norm(error) < allowed, path


@every_optimizer(3)
def test_optax_finds_the_parameters_in_the_state(name):
    """As other libraries lay out the optimizer's state; ours goes by paths and shapes."""
    if name == "sm3":
        pytest.skip("Optax's own state of it is not one tree like the parameters")
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
    if name in STATELESS:
        assert not found
        return
    assert set(found) == set(leaf_paths(shapes()))


@every_optimizer(3)
def test_the_head_may_be_tied_away(name):
    tied = {key: value for key, value in shapes().items() if key != "head"}
    tx = build(settings_of(name), Constant(), STEPS, tied)
    jax.eval_shape(tx.init, tied)


@every_optimizer(2)
def test_a_stack_is_its_layers_each_by_itself(name):
    """One stacked leaf, and its layers as leaves of their own, in one tree."""
    kernel = random_tree(0, jnp.zeros((LAYERS, WIDTH, HIDDEN)))
    bias = random_tree(1, jnp.zeros((LAYERS, HIDDEN)))
    stacked = {"blocks": {"a": {"kernel": kernel, "bias": bias}}}
    apart = lambda tree: {
        "blocks": {
            str(i): jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], tree["blocks"]["a"])
            for i in range(LAYERS)
        }
    }
    got = {}
    for kind, split in (("stacked", lambda tree: tree), ("apart", apart)):
        params = split(stacked)
        tx = build(settings_of(name), Constant(), STEPS, params)
        update = jax.jit(functools.partial(tx.update, value=VALUE))
        state = jax.jit(tx.init)(params)
        for step in range(3):
            grads = split(random_tree(10 + step, stacked))
            updates, state = update(grads, state, params)
        got[kind] = updates
    for i in range(LAYERS):
        for part in ("kernel", "bias"):
            np.testing.assert_allclose(
                got["stacked"]["blocks"]["a"][part][i],
                got["apart"]["blocks"][str(i)][part][0],
                rtol=2e-3,
                atol=2e-3 * float(jnp.abs(got["stacked"]["blocks"]["a"][part]).max()),
            )


@every_optimizer(2)
def test_rates_may_be_injected(name):
    """A rate in the state (`optax.inject_hyperparams`) changes without a compilation."""
    settings = settings_of(name)

    class Times(NamedTuple):
        """A schedule whose rate is the peak times a number of the state."""

        factor: jax.Array

        def build(self, peak, total_steps):
            return lambda step: self.factor * peak

    @optax.inject_hyperparams
    def injected(factor):
        return build(settings, Times(factor), STEPS, shapes())

    tx = injected(factor=1.0)
    params, grads = random_tree(0, shapes()), random_tree(1, shapes())
    traces = []

    @jax.jit
    def updates(state):
        traces.append(None)
        return tx.update(grads, state, params, value=VALUE)

    _, state = updates(jax.jit(tx.init)(params))
    one, _ = updates(state)
    half, _ = updates(state._replace(hyperparams={"factor": jnp.float32(0.5)}))
    assert len(traces) == 1
    leaves = [jax.tree.leaves(tree) for tree in (one, half)]
    if name not in NEEDS_VALUE:  # whose rate may be no more than a bound
        assert all((a != b).any() for a, b in zip(*leaves, strict=True))
    # others have the rate in their memory, or move on a sphere
    if not isinstance(settings, OptaxSettings) and name not in ("adamh", "muonh"):
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_allclose(a, 2 * b, rtol=1e-4, atol=1e-9)


@every_optimizer(1)
def test_accumulated_halves_are_one_update(name):
    """`optax.MultiSteps` around it: two gradients, one update with their mean."""
    tx = build(settings_of(name), Constant(), STEPS, shapes())
    twice = optax.MultiSteps(tx, 2)
    params = random_tree(0, shapes())
    # in units of 1/256, so that their sum is exact
    exact = lambda seed: jax.tree.map(
        lambda x: jnp.round(x * 256) / 256, random_tree(seed, shapes())
    )
    grads, change = exact(1), exact(2)

    @jax.jit
    def both():
        state, halves = tx.init(params), twice.init(params)
        for _ in range(2):
            whole, state = tx.update(grads, state, params, value=VALUE)
            for sign in (1, -1):
                part = jax.tree.map(lambda g, c, sign=sign: g + sign * c, grads, change)
                half, halves = twice.update(part, halves, params, value=VALUE)
        return (whole, state), (half, halves.inner_opt_state)

    for one, other in zip(*map(jax.tree.leaves, both()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * float(jnp.abs(one).max()))
