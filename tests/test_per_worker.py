"""The gradient function over workers: with the exact sum it is the whole-batch gradient."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compress.gradients import int8, top_k
from compress.gradients_lowrank import power_sgd
from model.presets import modern_tiny
from model.transformer import Transformer
from parallel.per_worker import per_worker
from parallel.reduce import all_reduce
from parallel.reduce_exchange import exchange_reduce
from parallel.reduce_factored import factored_reduce
from parallel.reduce_gather import gather_reduce
from parallel.ring_attention import ring_attention
from parallel.ring_layout import zigzag
from train.losses import counts_of, cross_entropy, loss_function, z_loss
from train.plugs import Context, Gradient, whole
from train.step import init_state, make_train_step

CONFIG = modern_tiny(
    zero_init_projections=False, scan_layers=True, dtype="float64", parameter_dtype="float64"
)
TERMS = [cross_entropy(), z_loss(weight=0.01)]


def mesh_of(**axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=devices)


def batch_of(rows=8, time=8):
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 64, (rows, time + 1))
    weights = (draw.random((rows, time)) < 0.7).astype(np.float32)
    weights[0] = 0  # workers hold different numbers of positions with weight
    return {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.asarray(weights),
    }


def setting(chunk=None):
    model, batch = Transformer(CONFIG), batch_of()
    shapes = jax.eval_shape(model.init, jax.random.key(1), batch["tokens"])["params"]
    draw = np.random.default_rng(2)
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape)), shapes)
    context = Context(jnp.int32(0), jax.random.key(0), {}, {}, counts_of(TERMS, batch))
    return loss_function(model, TERMS, chunk=chunk), params, batch, context


def relative_distance(a, b):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))


def two_parts(loss, params, batch, context):
    first = jax.tree.map(lambda a: jnp.split(a, 2)[0], batch)
    second = jax.tree.map(lambda a: jnp.split(a, 2)[1], batch)
    return jax.tree.map(jnp.add, *(whole(loss, params, half, context) for half in (first, second)))


@pytest.mark.parametrize("local", [whole, pytest.param(two_parts, marks=pytest.mark.slow)])
def test_the_exact_sum_is_the_gradient_of_the_whole_batch(local):
    with jax.enable_x64():
        loss, params, batch, context = setting(chunk=5)
        want, metrics = jax.jit(partial(whole, loss))(params, batch, context)
        _, init, apply = per_worker(all_reduce(), local)
        with jax.set_mesh(mesh_of(data=4)):
            got, found, _ = jax.jit(partial(apply, loss))(params, batch, context, init(params, {}))
        want, metrics, got, found = jax.device_get((want, metrics, got, found))
        assert relative_distance(got, want) < 1e-10
        assert found.keys() == metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6)  # counts are float32


@pytest.mark.slow
def test_with_ring_attention_and_a_tensor_axis():
    """A shard_map inside of another, on three axes."""
    with jax.enable_x64():
        loss, params, batch, context = setting()
        want, _ = jax.jit(partial(whole, loss))(params, batch, context)
        ring = loss_function(Transformer(CONFIG, attention=ring_attention()), TERMS)
        mesh = mesh_of(data=2, context=2, tensor=2)
        _, init, apply = per_worker(all_reduce())
        with jax.set_mesh(mesh):
            place = lambda a: jax.device_put(a, NamedSharding(mesh, P("data", "context")))
            laid = jax.tree.map(place, zigzag(batch, 2))
            got, _, _ = jax.jit(partial(apply, ring))(params, laid, context, init(params, {}))
        assert relative_distance(*jax.device_get((got, want))) < 1e-10


REDUCES = {
    "int8": exchange_reduce(int8()),
    "top_k": gather_reduce(top_k(0.1)),
    "power_sgd": factored_reduce(power_sgd(2, jax.random.key(7))),
}


@pytest.mark.slow
def test_compressed_gradients_train():
    """The loss falls as that of the exact sum does, and a carry keeps its shapes and types."""
    batch = batch_of()
    model = Transformer(modern_tiny(scan_layers=True))
    params = model.init(jax.random.key(0), batch["tokens"])["params"]
    context = Context(jnp.int32(0), jax.random.key(0), {}, {}, counts_of(TERMS, batch))
    loss, optimizer = loss_function(model, TERMS), optax.adam(1e-2)

    def losses_of(reduce):
        _, init, apply = per_worker(reduce)

        @jax.jit
        def step(params, state, carry, number):
            rng = jax.random.fold_in(context.rng, number)
            grads, metrics, carry = apply(loss, params, batch, context._replace(rng=rng), carry)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, carry, metrics["loss"]

        with jax.set_mesh(mesh_of(data=4)):
            now, state, carry = params, optimizer.init(params), init(params, {})
            shapes = jax.eval_shape(lambda c: c, carry)
            losses = []
            for number in range(30):
                now, state, carry, value = step(now, state, carry, number)
                losses.append(float(value))
            assert jax.eval_shape(lambda c: c, carry) == shapes
        return losses

    exact = losses_of(all_reduce())
    for reduce in REDUCES.values():
        got = losses_of(reduce)
        assert got[0] == pytest.approx(exact[0], rel=1e-6)
        assert exact[0] - got[-1] > 0.5 * (exact[0] - exact[-1])


@pytest.mark.slow
def test_in_the_training_step():
    """The carry lies in the state under the plug's name, and the exact sum changes nothing."""
    batch, optimizer = batch_of(), optax.sgd(0.1)
    model = Transformer(modern_tiny(layers=1))
    params = model.init(jax.random.key(0), batch["tokens"])["params"]

    def two_steps(gradient):
        state = init_state(jax.random.key(0), params, optimizer, gradient=gradient)
        step = jax.jit(make_train_step(model, TERMS, optimizer, gradient=gradient))
        for _ in range(2):
            state, metrics = step(state, {}, batch)
        return jax.device_get((state.params, metrics["loss"], state.extra))

    want, loss, _ = two_steps(whole)
    with jax.set_mesh(mesh_of(data=4)):
        exact, exact_loss, _ = two_steps(Gradient(*per_worker(all_reduce())))
        sparse = Gradient(*per_worker(gather_reduce(top_k(0.1)), name="sparse"))
        other, _, extra = two_steps(sparse)
    assert relative_distance(exact, want) < 1e-5
    assert exact_loss == pytest.approx(loss, rel=1e-5)
    error = extra["sparse"].worker["head"]["kernel"]
    assert error.shape == (4, *params["head"]["kernel"].shape)
    assert np.abs(error).max() > 0
    assert relative_distance(other, want) > 1e-4


class OnlyKey(NamedTuple):
    rng: jax.Array | None
    extra: dict = {}  # noqa: RUF012


def test_workers_draw_for_themselves():
    loss = lambda w, batch, context: (w * jax.random.normal(context.rng), {})
    key = jax.random.key(0)
    _, init, apply = per_worker(all_reduce())
    with jax.set_mesh(mesh_of(data=4)):
        one = jnp.float32(1)
        grads, _, _ = jax.jit(partial(apply, loss))(one, jnp.ones(4), OnlyKey(key), init(one, {}))
    want = sum(float(jax.random.normal(jax.random.fold_in(key, w))) for w in range(4))
    assert float(grads) == pytest.approx(want, rel=1e-5)


def test_errors():
    _, init, apply = per_worker(all_reduce())
    loss = lambda w, batch, context: (w * batch.sum(), {})
    with pytest.raises(ValueError, match="mesh axis 'data', but the mesh has no axes"):
        init(jnp.float32(1), {})
    with jax.set_mesh(mesh_of(data=4)):
        carry = init(jnp.float32(1), {})
        with pytest.raises(ValueError, match="6 rows does not divide over 4 workers"):
            apply(loss, jnp.float32(1), jnp.ones(6), OnlyKey(jax.random.key(0)), carry)
        with pytest.raises(ValueError, match="give the step's key"):
            apply(loss, jnp.float32(1), jnp.ones(8), OnlyKey(None), carry)
