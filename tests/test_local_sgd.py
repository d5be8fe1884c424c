"""Local training: with H = 1 it is data parallelism, with one worker it is plain training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from model.presets import modern_tiny
from model.transformer import Transformer
from parallel import local_sgd
from parallel.mesh import make_mesh
from parallel.placement import state_shardings
from parallel.placement_strategies import tensor
from parallel.traffic import collectives
from train.losses import cross_entropy
from train.step import init_state, make_train_step

PLAIN = optax.sgd(1.0)  # the outer optimizer that takes the mean as it is


def mesh_of(data):
    return jax.make_mesh((data,), ("data",), (AxisType.Auto,), devices=jax.devices()[:data])


def batches_of(steps, rows=8, time=8, seed=0):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 64, (steps, rows, time + 1))
    return {
        "tokens": jnp.asarray(tokens[..., :-1], jnp.int32),
        "targets": jnp.asarray(tokens[..., 1:], jnp.int32),
        "weights": jnp.ones((steps, rows, time), jnp.float32),
    }


def transformer(optimizer, dtype="float64"):
    config = modern_tiny(layers=1, dtype=dtype, parameter_dtype=dtype)
    model = Transformer(config)
    shapes = jax.eval_shape(model.init, jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]
    draw = np.random.default_rng(2)
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), dtype), shapes)
    state = init_state(jax.random.key(0), params, optimizer)
    return state, make_train_step(model, [cross_entropy()], optimizer)


def relative_distance(a, b):
    a, b = jax.device_get((a, b))
    return float(optax.tree.norm(jax.tree.map(np.subtract, a, b)) / optax.tree.norm(b))


def synchronous(state, step, batches):
    step = jax.jit(step)
    for number in range(batches["tokens"].shape[0]):
        state, _ = step(state, {}, jax.tree.map(lambda a: a[number], batches))  # noqa: B023
    return state


def local(state, step, batches, workers, inner_steps, outer, devices):
    with jax.set_mesh(mesh_of(devices)):
        inner, meet = jax.jit(local_sgd.inner_round(step)), jax.jit(local_sgd.outer_step(outer))
        state = local_sgd.init_local(state, workers, outer)
        for start in range(0, batches["tokens"].shape[0], inner_steps):
            cut = jax.tree.map(lambda a: a[start : start + inner_steps], batches)  # noqa: B023
            state, _ = inner(state, {}, cut)
            state = meet(state)
        return jax.block_until_ready(state)


def test_one_inner_step_is_synchronous_data_parallelism():
    with jax.enable_x64():
        state, step = transformer(optax.sgd(0.3))
        batches = batches_of(3)
        want = synchronous(state, step, batches)
        got = local(state, step, batches, workers=4, inner_steps=1, outer=PLAIN, devices=4)
        assert relative_distance(want.params, state.params) > 1e-3
        assert relative_distance(got.params, want.params) < 1e-10
        assert np.array_equal(got.workers.step, np.full(4, 3))


@pytest.mark.slow
def test_one_worker_is_plain_training():
    """With Adam inside, whose state must then survive the meeting, and dropout's draws."""
    with jax.enable_x64():
        config = modern_tiny(layers=1, dtype="float64", parameter_dtype="float64", dropout=0.2)
        model = Transformer(config)
        params = model.init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]
        state = init_state(jax.random.key(0), params, optax.adamw(1e-2))
        step = make_train_step(model, [cross_entropy()], optax.adamw(1e-2))
        batches = batches_of(4)
        want = synchronous(state, step, batches)
        got = local(state, step, batches, workers=1, inner_steps=2, outer=PLAIN, devices=1)
        assert relative_distance(got.params, want.params) < 1e-10
        one = jax.tree.map(lambda a: a[0], got.workers.optimizer)
        assert relative_distance(one[0].mu, want.optimizer[0].mu) < 1e-10


@pytest.mark.slow
def test_with_a_tensor_axis():
    """Parameters of a worker over several devices, as the placement lays them out."""
    with jax.enable_x64():
        state, step = transformer(optax.sgd(0.3))
        batches = batches_of(2)
        want = synchronous(state, step, batches)
        mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
        one = state_shardings(mesh, state, [tensor(state.params)])
        with jax.set_mesh(mesh):
            held = local_sgd.init_local(state, 2, PLAIN)
            held = jax.device_put(held, local_sgd.shardings(mesh, held, one))
            inner = jax.jit(local_sgd.inner_round(step))
            meet = jax.jit(local_sgd.outer_step(PLAIN))
            for number in range(2):
                held, _ = inner(held, {}, jax.tree.map(lambda a: a[number][None], batches))  # noqa: B023
                held = jax.block_until_ready(meet(held))
        kernel = held.workers.params["blocks"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.spec[:2] == ("data", None), kernel.sharding
        assert "tensor" in kernel.sharding.spec
        assert relative_distance(held.params, want.params) < 1e-10


class Toy:
    """A quadratic, whose rounds can be followed with a pencil: state.params is one number."""

    def __init__(self, params, rng):
        self.params, self.rng = params, rng

    def replace(self, **changes):
        return Toy(**{"params": self.params, "rng": self.rng, **changes})


jax.tree_util.register_pytree_node(
    Toy, lambda toy: ((toy.params, toy.rng), None), lambda _, children: Toy(*children)
)


def toy_step(state, frozen, batch):
    """Half of the way to the mean of the rows."""
    params = state.params + 0.5 * (batch.mean() - state.params)
    return state.replace(params=params), {"seen": batch.sum()}


@pytest.mark.variants(1)
@pytest.mark.parametrize(("workers", "devices"), [(4, 4), (4, 2), (4, 1), (2, 2)])
def test_rounds_follow_the_formula(strict, workers, devices):
    """Against Algorithm 1 of DiLoCo in numpy, momentum as in its Nesterov form."""
    draw = np.random.default_rng(0)
    batches = draw.normal(size=(6, 8)).astype(np.float32)  # 3 rounds of H = 2
    rate, momentum = 0.7, 0.9
    theta, velocity, seen = 1.0, 0.0, []
    for start in (0, 2, 4):
        ends = []
        for w in range(workers):
            x = theta
            for row in batches[start : start + 2]:
                x += 0.5 * (np.split(row, workers)[w].mean() - x)
            ends.append(x)
        delta = theta - np.mean(ends)
        velocity = momentum * velocity + delta
        theta -= rate * (delta + momentum * velocity)
        seen.append(theta)

    outer = local_sgd.nesterov(rate, momentum)
    with jax.set_mesh(mesh_of(devices)):
        state = local_sgd.init_local(Toy(jnp.float32(1), jax.random.key(0)), workers, outer)
        inner = jax.jit(local_sgd.inner_round(toy_step))
        meet = jax.jit(local_sgd.outer_step(outer))
        for number, start in enumerate((0, 2, 4)):
            state, metrics = inner(state, {}, jnp.asarray(batches[start : start + 2]))
            parts = batches[start : start + 2].reshape(2, workers, -1).sum(axis=-1)
            np.testing.assert_allclose(metrics["seen"], parts, rtol=1e-5)
            state = meet(state)
            np.testing.assert_allclose(state.params, seen[number], rtol=1e-5)
            np.testing.assert_array_equal(state.workers.params, np.full(workers, state.params))
            # Each device holds its own workers alone.
            shards = state.workers.params.addressable_shards
            assert [shard.data.shape for shard in shards] == [(workers // devices,)] * devices


def test_workers_draw_for_themselves_and_worker_0_as_the_run():
    key = jax.random.key(3)
    state = local_sgd.init_local(Toy(jnp.float32(1), key), 4, PLAIN)
    draws = np.asarray(jax.vmap(jax.random.normal)(state.workers.rng))
    assert len(set(draws.tolist())) == 4
    assert draws[0] == jax.random.normal(key)


@pytest.mark.variants(1)
@pytest.mark.parametrize("new", [1, 2, 8])
def test_redistribution_keeps_the_mean_that_the_outer_step_sees(strict, new):
    outer = local_sgd.nesterov()
    with jax.set_mesh(mesh_of(1)):
        state = local_sgd.init_local(Toy(jnp.float32(1), jax.random.key(0)), 4, outer)
        rows = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
        state, _ = local_sgd.inner_round(toy_step)(state, {}, rows)  # in the middle of a round
        moved = local_sgd.redistribute(state, new)
        assert local_sgd.count_workers(moved) == new
        meet = local_sgd.outer_step(outer)
        np.testing.assert_allclose(meet(moved).params, meet(state).params, rtol=1e-6)
        want = local_sgd.init_local(Toy(jnp.float32(1), jax.random.key(0)), new, outer)
        assert (moved.workers.rng == want.workers.rng).all()
    assert local_sgd.redistribute(state, 4) is state


@pytest.mark.slow
def test_redistribution_of_a_training_state():
    """Moments are averaged, counts stay whole numbers, and the step runs on."""
    optimizer = optax.adamw(1e-2)
    state, step = transformer(optimizer, "float32")
    outer = local_sgd.nesterov()
    with jax.set_mesh(mesh_of(2)):
        inner = jax.jit(local_sgd.inner_round(step))
        state = local_sgd.init_local(state, 4, outer)
        state, _ = inner(state, {}, batches_of(1))
        moved = local_sgd.redistribute(state, 2)
        assert moved.workers.step.tolist() == [1, 1]
        assert moved.workers.optimizer[0].count.dtype == jnp.int32
        old, new = (s.workers.optimizer[0].mu["head"]["kernel"] for s in (state, moved))
        np.testing.assert_allclose(new[1], np.asarray(old).mean(axis=0), rtol=1e-5, atol=1e-9)
        after, metrics = inner(moved, {}, batches_of(1))
        assert after.workers.step.tolist() == [2, 2]
        assert np.isfinite(metrics["loss"]).all()


def test_bytes_are_those_of_the_compiled_program(strict):
    """The inner round says nothing at all; the outer step sends what the formula says."""
    outer, mesh = local_sgd.nesterov(), mesh_of(4)
    params = {"a": jnp.ones((16, 8)), "b": jnp.ones(40, jnp.bfloat16)}
    step = lambda s, frozen, batch: (
        s.replace(params=jax.tree.map(lambda p: p * batch.mean().astype(p.dtype), s.params)),
        {},
    )
    with jax.set_mesh(mesh):
        state = local_sgd.init_local(Toy(params, jax.random.key(0)), 4, outer)
        state = jax.device_put(state, local_sgd.shardings(mesh, state))
        text = lambda f, *args: jax.jit(f).lower(*args).compile().as_text()
        rows = jax.device_put(
            jnp.ones((3, 8)), jax.sharding.NamedSharding(mesh, jax.P(None, "data"))
        )
        inner = collectives(text(local_sgd.inner_round(step), state, {}, rows), mesh)
        found = collectives(text(local_sgd.outer_step(outer), state), mesh)
    assert inner == []
    assert {each.kind for each in found} == {"all-reduce"}
    want = local_sgd.bytes_per_token(params, workers=4, inner_steps=3, tokens=5) * 3 * 5
    assert sum(each.sent for each in found) == pytest.approx(want, rel=1e-12)


def test_errors():
    state = local_sgd.init_local(Toy(jnp.float32(1), jax.random.key(0)), 4, PLAIN)
    inner, meet = local_sgd.inner_round(toy_step), local_sgd.outer_step(PLAIN)
    with pytest.raises(ValueError, match="mesh axis 'data', but the mesh has no axes"):
        meet(state)
    with jax.set_mesh(mesh_of(8)), pytest.raises(ValueError, match="4 workers do not divide over"):
        meet(state)
    with jax.set_mesh(mesh_of(4)), pytest.raises(ValueError, match="multiple of 4 rows"):
        inner(state, {}, jnp.ones((2, 6)))
    with pytest.raises(ValueError, match="0 workers"):
        local_sgd.redistribute(state, 0)
    with pytest.raises(ValueError, match="0 inner steps"):
        local_sgd.bytes_per_token(jnp.ones(2), 2, 0, 5)
