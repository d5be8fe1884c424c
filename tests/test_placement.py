"""Placement: training on a mesh equals training on one device; state follows its parameter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from model.flops import abstract_params
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.rules import leaf_paths
from model.transformer import Transformer
from parallel.mesh import make_mesh, parse_mesh
from parallel.placement import (
    constrain,
    place_batch,
    state_shardings,
)
from parallel.placement_strategies import strategies_for
from train.losses import counts_of, cross_entropy, loss_function
from train.optimizers import OPTIMIZERS, build
from train.plugs import Context, State, whole
from train.schedules import Constant
from train.step import init_state, make_train_step

TERMS = [cross_entropy()]
CONFIGS = {
    "gpt2": gpt2_tiny(dropout=0.0, scan_layers=True),
    "modern": modern_tiny(zero_init_projections=False),
    "llama": llama_tiny(scan_layers=True, remat="full"),
}
# The loss does not depend on a key bias (it moves all scores of a query alike), so that its
# gradient is rounding noise, which Adam then scales up.
NO_GRADIENT = ("blocks/attention/k/bias",)


def batch_of(rows=8, time=16, vocabulary=64):
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, vocabulary, (rows, time + 1)).astype(np.int32)
    weights = (draw.random((rows, time)) < 0.7).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def config_of(name, dtype):
    return dataclasses.replace(CONFIGS[name], dtype=dtype, parameter_dtype=dtype)


def params_of(config):
    """Every leaf redrawn at a visible scale, biases and scales too."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(Transformer(config).init)(jax.random.key(0), tokens)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            leaf + 0.1 * jax.random.normal(k, leaf.shape, leaf.dtype)
            for leaf, k in zip(leaves, keys, strict=True)
        ],
    )


def optimizer_of(name, config):
    return build(OPTIMIZERS[name](), Constant(), 10, abstract_params(config))


def run(model, config, optimizer, place_state, place_batch, steps=3):
    """The first gradient and the parameters after some steps, as NumPy arrays by path."""
    optimizer = optimizer_of(optimizer, config)
    state = init_state(jax.random.key(2), params_of(config), optimizer)
    shardings = place_state(state)
    state = jax.device_put(state, shardings)
    batch = place_batch(batch_of())
    loss = loss_function(model, TERMS)

    def gradient(params, batch):
        context = Context(jnp.int32(0), None, {}, {}, counts_of(TERMS, batch))
        return whole(loss, params, batch, context)[0]

    step = jax.jit(
        make_train_step(model, TERMS, optimizer),
        donate_argnums=0,
        out_shardings=None if shardings is None else (shardings, None),
    )
    grads = jax.device_get(jax.jit(gradient)(state.params, batch))
    for _ in range(steps):
        state, metrics = step(state, {}, batch)
        jax.block_until_ready(metrics)  # a bounded number in flight, or XLA:CPU deadlocks
    if shardings is not None:
        placed = jax.tree.map(lambda a: a.sharding, state)
        same = jax.tree.map(
            lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), placed, shardings, state
        )
        assert all(jax.tree.leaves(same))
    return [
        dict(zip(leaf_paths(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))
        for tree in (grads, jax.device_get(state.params))
    ]


@functools.cache
def on_one_device(config, optimizer):
    return run(Transformer(config), config, optimizer, lambda state: None, jax.device_put)


def on_mesh(config, optimizer, mesh, more=()):
    mesh = make_mesh(**parse_mesh(mesh))
    strategies = strategies_for(mesh, abstract_params(config), more)
    return run(
        Transformer(config, constrain=constrain(mesh, strategies)),
        config,
        optimizer,
        lambda state: state_shardings(mesh, state, strategies),
        lambda batch: place_batch(mesh, batch),
    )


def assert_equal(got, expected, dtype):
    """As the design defines it: in float64 by tensor, in float32 by the norm of the whole."""
    for tree, other in zip(got, expected, strict=True):
        assert tree.keys() == other.keys()
        paths = [path for path in tree if path not in NO_GRADIENT]
        apart = {path: np.linalg.norm(tree[path] - other[path]) for path in paths}
        if dtype == "float64":
            assert tree[paths[0]].dtype == np.float64
            for path in paths:
                assert apart[path] <= 1e-10 * np.linalg.norm(other[path]), path
        else:
            norm = np.sqrt(sum(np.linalg.norm(other[path]) ** 2 for path in paths))
            assert np.sqrt(sum(d**2 for d in apart.values())) <= 1e-5 * norm


def check(name, optimizer, mesh, dtype, more=()):
    config = config_of(name, dtype)
    with jax.enable_x64(dtype == "float64"):
        assert_equal(
            on_mesh(config, optimizer, mesh, more), on_one_device(config, optimizer), dtype
        )


MESHES = [
    ("data=8", ()),
    ("fsdp=8", ()),
    ("data=2,tensor=4", ()),
    ("data=2,fsdp=2,tensor=2", ()),
    ("context=2", ()),
    ("data=8", ("zero1",)),
    ("data=2,tensor=4", ("sequence",)),
    ("pipeline=2,fsdp=2,tensor=2", ()),
    ("data=2,context=2,tensor=2", ("zero1", "sequence")),
]


@pytest.mark.parametrize(("mesh", "more"), [MESHES[3]])
def test_training_on_a_mesh_equals_one_device(mesh, more):
    check("gpt2", "adamw", mesh, "float64", more)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "more"), MESHES)
def test_every_mesh_equals_one_device(mesh, more):
    check("gpt2", "adamw", mesh, "float64", more)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("modern", "float64"), ("llama", "float32")])
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_other_blocks_and_muon_equal_one_device(mesh, name, dtype):
    check(name, "muon", mesh, dtype)


def test_the_comparison_notices_a_difference():
    """Of one part in a million in one tensor, in float64."""
    tree = [{"a": np.ones(4), "b": np.ones(4)}] * 2
    other = [{"a": np.ones(4), "b": np.ones(4) + 1e-6}] * 2
    assert_equal(tree, tree, "float64")
    with pytest.raises(AssertionError, match="b"):
        assert_equal(other, tree, "float64")


def test_a_history_of_a_parameter_lies_where_the_parameter_does():
    """What a method keeps of several steps has one more axis in front."""
    mesh = make_mesh(data=4, fsdp=2)
    kernel = jax.ShapeDtypeStruct((2, 8, 16), jnp.float32)
    params = {"blocks": {"mlp": {"up": {"kernel": kernel}}}}
    history = jax.tree.map(lambda k: jax.ShapeDtypeStruct((3, *k.shape), k.dtype), params)
    state = State(
        jax.ShapeDtypeStruct((), jnp.int32),
        params,
        (),
        jax.eval_shape(jax.random.key, 0),
        {"delayed": history},
    )
    shardings = state_shardings(mesh, state, strategies_for(mesh, params))
    up = shardings.extra["delayed"]["blocks"]["mlp"]["up"]["kernel"]
    assert up.spec == P(None, None, "fsdp")
    assert up.shard_shape((3, 2, 8, 16)) == (3, 2, 4, 16)
