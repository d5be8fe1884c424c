"""`per_layer`: a stacked update equals the updates of its layers, each by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.optimizers.per_layer import per_layer

LAYERS = 3


def normal(seed, *sizes):
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes), jnp.float32)


def tree(seed):
    return {
        "blocks": {
            "up": {
                "kernel": normal(seed, LAYERS, 4, 6) * jnp.array([0.1, 1.0, 10.0])[:, None, None],
                "bias": normal(seed + 1, LAYERS, 6),
            }
        },
        "head": {"kernel": normal(seed + 2, 4, 5)},
    }


def layer(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], {"blocks": tree["blocks"]})


def rest(tree):
    return {"head": tree["head"]}


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one, other)


TRANSFORMATIONS = {
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lamb": lambda: optax.lamb(0.1),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(0.5),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "scheduled adam": lambda: optax.adam(optax.linear_schedule(0.1, 0.0, 5)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_equals_the_layers_one_by_one(name):
    tx = TRANSFORMATIONS[name]()
    stacked = per_layer(tx)
    params = tree(0)
    state = stacked.init(params)
    parts = [*(layer(params, i) for i in range(LAYERS)), rest(params)]
    states = [tx.init(part) for part in parts]
    update, update_part = jax.jit(stacked.update), jax.jit(tx.update)
    for step in range(1, 4):
        grads = tree(10 * step)
        got, state = update(grads, state, params)
        pieces = [*(layer(grads, i) for i in range(LAYERS)), rest(grads)]
        for i, (piece, part) in enumerate(zip(pieces, parts, strict=True)):
            expected, states[i] = update_part(piece, states[i], part)
            assert_close(layer(got, i) if i < LAYERS else rest(got), expected)


def test_it_is_not_what_the_stacked_leaf_gives():
    """The test above would pass for nothing if these looked at no more than an element."""
    params, grads = tree(0), tree(10)
    for name in ("adafactor", "lamb", "clip_by_block_rms", "clip_by_global_norm"):
        tx = TRANSFORMATIONS[name]()
        once = lambda tx: tx.update(grads, tx.init(params), params)[0]["blocks"]["up"]["kernel"]
        kernels = jax.jit(lambda once=once, tx=tx: (once(tx), once(per_layer(tx))))()
        assert not np.allclose(*kernels, rtol=1e-2), name


def seeing(record):
    """A transformation that adds what it is given through extra arguments."""

    def update(updates, state, params=None, *, value, grads, **others):
        shapes = [leaf.shape for leaf in jax.tree.leaves(grads)]
        record.append((shapes, jnp.shape(value), set(others)))
        return jax.tree.map(lambda u, g: u + value * g, updates, grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_extra_arguments_shaped_like_the_parameters_go_by_layer_and_others_whole():
    record = []
    tx = per_layer(seeing(record))
    updates, grads = tree(0), tree(10)
    got, _ = tx.update(updates, tx.init(updates), updates, value=2.0, grads=grads, step=7)
    assert_close(got, jax.tree.map(lambda u, g: u + 2.0 * g, updates, grads))
    assert sorted(shapes for shapes, _, _ in record) == [[(4, 5)], [(6,), (4, 6)]]
    assert all(value == () and others == {"step"} for _, value, others in record)


def test_inside_a_partition_too():
    """As when only some of the parameters are given to the transformation."""
    labels = {"blocks": {"up": {"kernel": "a", "bias": "b"}}, "head": {"kernel": "a"}}
    tx = optax.partition(
        {"a": per_layer(optax.clip_by_global_norm(1.0)), "b": optax.identity()}, labels
    )
    updates = tree(0)
    got, _ = tx.update(updates, tx.init(updates), updates)
    norms = jnp.linalg.norm(got["blocks"]["up"]["kernel"], axis=(1, 2))
    before = jnp.linalg.norm(updates["blocks"]["up"]["kernel"], axis=(1, 2))
    np.testing.assert_allclose(norms, jnp.minimum(before, 1.0), rtol=1e-5)
    np.testing.assert_array_equal(got["blocks"]["up"]["bias"], updates["blocks"]["up"]["bias"])


@pytest.mark.parametrize("keep", ["blocks", "head"])
def test_trees_that_are_all_stacked_or_not_at_all(keep):
    params = {keep: tree(0)[keep]}
    tx = per_layer(optax.clip_by_global_norm(1e-3))
    got, _ = jax.jit(tx.update)(params, tx.init(params), params)
    expected = LAYERS if keep == "blocks" else 1
    assert float(optax.tree.norm(got)) == pytest.approx(1e-3 * expected**0.5, rel=1e-4)


def test_the_state_of_the_stack_has_its_layers_in_front_and_all_else_is_plain():
    state = jax.eval_shape(per_layer(optax.adam(0.1)).init, tree(0))
    stacked = jax.tree.leaves(state.inner_states["stacked"])
    assert {leaf.shape[0] for leaf in stacked} == {LAYERS}
    assert len(stacked) == 1 + 2 * 2  # the count, and two moments of two leaves
    assert {leaf.shape for leaf in jax.tree.leaves(state.inner_states["rest"])} == {(), (4, 5)}


def test_layers_of_unequal_number_are_refused():
    params = {"blocks": {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3))}}
    with pytest.raises(ValueError, match="inconsistent sizes"):
        per_layer(optax.adam(0.1)).init(params)


def test_stacks_of_other_depths_go_each_by_their_own_layers():
    """An encoder and a decoder."""
    tx = optax.lamb(0.1)
    stacks = {
        "encoder/blocks": {"encoder": {"blocks": {"kernel": normal(0, 2, 4, 6)}}},
        "decoder/blocks": {"decoder": {"blocks": {"kernel": normal(1, 3, 4, 6)}}},
    }
    params = {name: part for stack in stacks.values() for name, part in stack.items()}
    whole = per_layer(tx)
    found, state = jax.jit(whole.update)(params, whole.init(params), params)
    found, _ = jax.jit(whole.update)(found, state, params)
    for name, part in stacks.items():
        alone = per_layer(tx)
        expected, state = alone.update(part, alone.init(part), part)
        expected, _ = alone.update(expected, state, part)
        own = name.split("/")[0]
        assert_close(found[own], expected[own])
