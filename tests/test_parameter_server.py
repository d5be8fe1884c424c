"""The sharded synchronous server: it computes what data parallelism does, with a W-th of state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from model.presets import modern_tiny
from model.transformer import Transformer
from parallel import parameter_server as server
from parallel.parameter_server_elementwise import check_elementwise
from parallel.traffic import collectives
from train.losses import counts_of, cross_entropy, loss_function
from train.plugs import Context, whole


class OnlyKey(NamedTuple):
    rng: jax.Array | None = None


def mesh_of(**axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=devices)


def layers(dtype=jnp.float32):
    """A stack of small layers whose sizes no number of workers here divides, and a scalar."""
    draw = np.random.default_rng(0)
    shapes = {"blocks": {"kernel": (3, 5, 5), "bias": (3, 5)}, "head": {"scale": ()}}
    leaf = lambda shape: jnp.asarray(0.5 * draw.normal(size=shape), dtype)
    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def loss(params, batch, context):
    """Mean square over the whole batch: shares of workers add up to it."""

    def layer(x_BD, w):
        return jnp.tanh(x_BD @ w["kernel"] + w["bias"][None]), None

    x_BD, _ = jax.lax.scan(layer, batch["x"], params["blocks"])
    value = jnp.square(x_BD * params["head"]["scale"] - batch["y"]).sum() / 8
    return value, {"loss": value}


def batch_of(dtype=jnp.float32):
    draw = np.random.default_rng(1)
    return {name: jnp.asarray(draw.normal(size=(8, 5)), dtype) for name in ("x", "y")}


def relative_distance(a, b):
    a, b = jax.device_get((a, b))
    return float(optax.tree.norm(jax.tree.map(np.subtract, a, b)) / optax.tree.norm(b))


OPTIMIZERS = {
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "momentum": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "lion": optax.lion(0.05),
    "masked": optax.adamw(0.05, mask={"blocks": {"kernel": True, "bias": False}, "head": False}),
}


MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("momentum", "lion")]


@pytest.mark.variants(1)
@pytest.mark.parametrize("name", ["adamw", "masked", *MORE])
def test_it_is_data_parallelism(name):
    """Three steps, clipped by the norm over all slices."""
    with jax.enable_x64():
        params, batch = layers(jnp.float64), batch_of(jnp.float64)
        want, clip = params, 0.3
        tx = optax.chain(optax.clip_by_global_norm(clip), OPTIMIZERS[name])
        state = tx.init(want)
        for number in range(3):
            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(want, batch, None)
            assert number or optax.tree.norm(grads) > clip
            updates, state = tx.update(grads, state, want)
            want = optax.apply_updates(want, updates)

        held = server.init_server(params, OPTIMIZERS[name], 4)
        step = jax.jit(server.server_step(loss, OPTIMIZERS[name], params, clip=clip))
        with jax.set_mesh(mesh_of(data=4)):
            for _ in range(3):
                held, metrics = step(held, batch, OnlyKey(jax.random.key(0)))
        assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-12)
        assert relative_distance(server.whole_params(held, params), want) < 1e-10


def test_own_code_is_strict(strict):
    params, batch = layers(jnp.bfloat16), batch_of(jnp.bfloat16)
    tx = optax.adam(0.1)
    step = jax.jit(server.server_step(loss, tx, params, clip=1.0))
    with jax.set_mesh(mesh_of(data=2)):
        held, _ = step(server.init_server(params, tx, 2), batch, OnlyKey(jax.random.key(0)))
    assert jax.tree.map(lambda a: a.dtype, server.whole_params(held, params)) == jax.tree.map(
        lambda a: a.dtype, params
    )


@pytest.mark.slow
def test_it_trains_a_transformer_on_two_axes():
    """Rows without weight, so that the workers' counts differ, and a tensor axis left automatic."""
    with jax.enable_x64():
        model = Transformer(modern_tiny(layers=1, dtype="float64", parameter_dtype="float64"))
        draw = np.random.default_rng(0)
        tokens = jnp.asarray(draw.integers(0, 64, (8, 8)), jnp.int32)
        weights = jnp.asarray(draw.random((8, 8)) < 0.6, jnp.float32)
        batch = {"tokens": tokens, "targets": tokens, "weights": weights}
        params = model.init(jax.random.key(1), tokens)["params"]
        terms, tx = [cross_entropy()], optax.adamw(1e-2)
        context = Context(jnp.int32(0), jax.random.key(0), {}, {}, counts_of(terms, batch))
        lm_loss = loss_function(model, terms)

        @jax.jit
        def plain(params, state):
            grads, _ = whole(lm_loss, params, batch, context)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        want, state = plain(*plain(params, tx.init(params)))
        held = server.init_server(params, tx, 4)
        step = jax.jit(server.server_step(lm_loss, tx, params))
        with jax.set_mesh(mesh_of(data=4, tensor=2)):
            for _ in range(2):
                held, _ = step(held, batch, context)
        assert relative_distance(server.whole_params(held, params), want) < 1e-10


def test_a_device_holds_its_part():
    params, tx, mesh = layers(), optax.adam(0.1), mesh_of(data=8)
    held = server.init_server(params, tx, 8)
    held = jax.device_put(held, server.server_shardings(mesh, held))
    step = jax.jit(server.server_step(loss, tx, params), donate_argnums=0)
    with jax.set_mesh(mesh):
        held, _ = step(held, batch_of(), OnlyKey(jax.random.key(0)))
    for leaf in jax.tree.leaves(held):
        local = leaf.addressable_shards[0].data
        assert local.size == (leaf.size // 8 if leaf.ndim else 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(held.params)) < 92 + 3 * 8  # n + padding


@pytest.mark.variants(1)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_collectives_are_those_of_the_formula(clip):
    params, tx, mesh = layers(), optax.adam(0.1), mesh_of(data=4)
    held = server.init_server(params, tx, 4)
    held = jax.device_put(held, server.server_shardings(mesh, held))
    batch = jax.device_put(batch_of(), NamedSharding(mesh, P("data")))
    step = jax.jit(server.server_step(loss, tx, params, clip=clip))
    with jax.set_mesh(mesh):
        text = step.lower(held, batch, OnlyKey(jax.random.key(0))).compile().as_text()
    found = collectives(text, mesh)
    large = [each for each in found if each.kind != "all-reduce" or each.bytes > 16]
    assert {each.kind for each in large} == {"all-gather", "reduce-scatter"}
    assert sum(each.sent for each in large) == server.bytes_sent(params, 4)
    scalars = sum(each.bytes for each in found) - sum(each.bytes for each in large)
    assert scalars == 4 * (1 + (clip is not None))  # the loss, the square of the norm


@pytest.mark.variants(1)
@pytest.mark.parametrize("new", [1, 3, 8])
def test_redistribution_goes_on_as_before(new):
    """A step on another number of workers is the step that the old ones would have made."""
    params, tx, context = layers(), optax.adam(0.1), OnlyKey(jax.random.key(0))
    batch = jax.tree.map(lambda a: jnp.tile(a, (3, 1)), batch_of())  # 24 rows
    step = jax.jit(server.server_step(loss, tx, params))

    def one(state, workers):
        with jax.set_mesh(mesh_of(data=workers)):
            return jax.device_get(step(state, batch, context)[0])

    held = one(server.init_server(params, tx, 4), 4)
    moved = server.redistribute(held, tx, params, new)
    want, got = (server.whole_params(s, params) for s in (one(held, 4), one(moved, new)))
    assert relative_distance(got, want) < 1e-6


SAFE = {
    **OPTIMIZERS,
    "sgd": optax.sgd(0.1),
    "adagrad": optax.adagrad(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "clip of each number": optax.chain(optax.clip(1.0), optax.adam(0.1)),
}
WHOLE = {
    "global norm": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "lamb": optax.lamb(0.1),
    "lars": optax.lars(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
    "factored": optax.scale_by_factored_rms(min_dim_size_to_factor=5),
    "muon": optax.contrib.muon(0.1),
    "by shape": optax.adamw(0.1, mask=lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)),
    "centralized": optax.centralize(),
}


@pytest.mark.variants(3)
@pytest.mark.parametrize("name", SAFE)
def test_elementwise_optimizers_pass(name):
    check_elementwise(SAFE[name], layers())


@pytest.mark.variants(3)
@pytest.mark.parametrize("name", WHOLE)
def test_optimizers_of_whole_leaves_are_refused(name):
    with pytest.raises(ValueError, match="does not treat each number by itself"):
        server.init_server({"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}, WHOLE[name], 2)


def test_errors():
    params, tx, batch = layers(), optax.sgd(0.1), batch_of()
    held = server.init_server(params, tx, 4)
    step = server.server_step(loss, tx, params)
    with pytest.raises(ValueError, match="mesh axis 'data', but the mesh has no axes"):
        step(held, batch, OnlyKey())
    with jax.set_mesh(mesh_of(data=8)), pytest.raises(ValueError, match=r"redistribute\(..., 8\)"):
        step(held, batch, OnlyKey())
    with jax.set_mesh(mesh_of(data=4)):
        with pytest.raises(ValueError, match="6 rows does not divide over 4 workers"):
            step(held, jax.tree.map(lambda a: a[:6], batch), OnlyKey())
        with pytest.raises(ValueError, match="give the step's key"):
            step(held, batch, OnlyKey())
    with pytest.raises(ValueError, match="0 workers"):
        server.init_server(params, tx, 0)
