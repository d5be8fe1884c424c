"""What reduces keep: the sum of all gradients over time, the same bits on every worker."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from compress.gradients import int8, top_k
from compress.gradients_lowrank import power_sgd
from parallel.reduce import Carry, all_reduce, spread_error
from parallel.reduce_exchange import exchange_reduce
from parallel.reduce_factored import factored_reduce
from parallel.reduce_gather import gather_reduce

REDUCES = {
    "plain": all_reduce(),
    "int8": exchange_reduce(int8(block=8)),
    "top_k": gather_reduce(top_k(0.1)),
    "power_sgd": factored_reduce(power_sgd(2, jax.random.key(7))),
}
SHAPES = {
    "blocks": {"up": {"kernel": (3, 8, 6), "bias": (3, 6)}, "norm": {"scale": (3, 8)}},
    "head": {"kernel": (8, 10)},
}


def mesh_of(workers):
    return jax.make_mesh((workers,), ("data",), (AxisType.Auto,), devices=jax.devices()[:workers])


def draw(seed, workers, dtype=np.float32, shapes=SHAPES):
    """The gradients of all workers, [W, ...]; a part of them the same in every step."""
    is_shape = lambda x: isinstance(x, tuple)
    always, now = np.random.default_rng(0), np.random.default_rng(seed)
    one = lambda s: always.normal(size=(workers, *s)) + now.normal(size=(workers, *s))
    return jax.tree.map(lambda s: one(s).astype(dtype), shapes, is_leaf=is_shape)


def start(reduce, grads_W):
    workers = jax.tree.leaves(grads_W)[0].shape[0]
    carry = reduce.init(jax.tree.map(lambda g: jnp.asarray(g[0]), grads_W), workers)
    copies = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (workers, *a.shape)), carry.worker)
    return Carry(copies, carry.shared)


def runner(reduce, workers):
    """`(grads_W, carry, key) -> (what every worker ended with [W, ...], carry)`."""

    def inside(grads, carry, key):
        first = partial(jax.tree.map, lambda a: a[0])
        total, new = reduce.apply(first(grads), Carry(first(carry.worker), carry.shared), key)
        add_axis = partial(jax.tree.map, lambda a: a[None])
        return add_axis(total), Carry(add_axis(new.worker), new.shared)

    spec = Carry(P("data"), P())
    run = jax.shard_map(
        inside,
        mesh=mesh_of(workers),
        in_specs=(P("data"), spec, P()),
        out_specs=(P("data"), spec),
    )
    return jax.jit(run)


def norm(tree):
    return math.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(tree)))


def subtract(a, b):
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)


def debt(carry, like):
    """What all workers still owe to the parameters."""
    worker = jax.tree.map(np.asarray, carry.worker)
    if not isinstance(worker, dict) or "slice_error" not in worker:
        # Leaves that a reduce sums exactly owe nothing, and carry nothing.
        leaves, structure = jax.tree.flatten(like)
        owed = structure.flatten_up_to(worker) if worker else [()] * len(leaves)
        owed = [
            np.zeros_like(x) if isinstance(o, tuple) else o.sum(0)
            for x, o in zip(leaves, owed, strict=True)
        ]
        return structure.unflatten(owed)
    flat, start, leaves = worker["slice_error"].reshape(-1), 0, []
    for leaf in jax.tree.leaves(worker["error"]):
        size = leaf[0].size
        leaves.append(leaf.sum(0) + flat[start : start + size].reshape(leaf.shape[1:]))
        start += size
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


@pytest.mark.variants(2)
@pytest.mark.parametrize("name", REDUCES)
def test_error_feedback_keeps_the_running_sum(name):
    """Applied so far + owed = the true sum so far, to rounding; and what is owed stays bounded."""
    reduce, workers = REDUCES[name], 4
    run = runner(reduce, workers)
    with jax.enable_x64():
        carry = start(reduce, draw(0, workers, np.float64))
        true = applied = jax.tree.map(lambda g: np.zeros(g.shape[1:]), draw(0, workers))
        owed = []
        for step in range(30):
            grads = draw(step + 1, workers, np.float64)
            with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
                total, carry = run(grads, carry, jax.random.key(step))
            true = jax.tree.map(lambda t, g: t + g.sum(0), true, grads)
            applied = jax.tree.map(lambda a, t: a + np.asarray(t[0]), applied, total)
            missing = subtract(true, applied)
            assert norm(subtract(missing, debt(carry, missing))) < 1e-10 * norm(true)
            owed.append(norm(missing) / norm(jax.tree.map(lambda g: g.sum(0), grads)))
    assert owed[-1] < 1.5 * max(owed[10:20]) + 1e-10


@pytest.mark.variants(2)
@pytest.mark.parametrize("name", REDUCES)
def test_all_workers_hold_the_same_bits_and_the_key_decides(name):
    workers = 4
    run, grads = runner(REDUCES[name], workers), draw(1, workers)
    first, again, other = (
        run(grads, start(REDUCES[name], grads), jax.random.key(k))[0] for k in (0, 0, 1)
    )
    for leaf, same in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert all(bytes(np.asarray(leaf[w])) == bytes(np.asarray(leaf[0])) for w in range(workers))
        np.testing.assert_array_equal(leaf, same)
    assert (norm(subtract(first, other)) > 0) == (name == "int8")


def test_plain_and_complete_codes_are_exact():
    exact = {
        "plain": all_reduce(),
        "top_k": gather_reduce(top_k(1.0)),
        "power_sgd": factored_reduce(power_sgd(6, jax.random.key(3))),
    }
    with jax.enable_x64():
        grads = draw(1, 4, np.float64)
        want = jax.tree.map(lambda g: g.sum(0), grads)
        for reduce in exact.values():
            total, _ = runner(reduce, 4)(grads, start(reduce, grads), jax.random.key(0))
            got = jax.tree.map(lambda t: t[0], total)
            # The head is 8 x 10 and its gradient has rank 8: rank 6 cannot be exact there.
            got["head"], true = (
                (want["head"], want) if reduce is exact["power_sgd"] else (got["head"], want)
            )
            assert norm(subtract(got, true)) < 1e-10 * norm(true)


def test_top_k_equals_numpy():
    grads = draw(2, 4)
    total, carry = runner(REDUCES["top_k"], 4)(
        grads, start(REDUCES["top_k"], grads), jax.random.key(0)
    )
    kernel = grads["blocks"]["up"]["kernel"]
    want = np.zeros(kernel.shape[1:], np.float32)
    for worker in kernel:
        for layer, matrix in enumerate(worker):
            flat = matrix.ravel()
            for i in np.argsort(-np.abs(flat))[:5]:  # 10 % of 8 x 6
                want[layer].ravel()[i] += flat[i]
    np.testing.assert_allclose(total["blocks"]["up"]["kernel"][0], want, rtol=1e-6)


def test_power_sgd_approaches_the_best_low_rank():
    """Warm started on one and the same gradient, P Q' becomes the truncated SVD of the sum."""
    reduce = factored_reduce(power_sgd(2, jax.random.key(0)))
    grads = {"kernel": np.random.default_rng(0).normal(size=(4, 12, 9)).astype(np.float32)}
    u, s, vt = np.linalg.svd(grads["kernel"].sum(0))
    best = (u[:, :2] * s[:2]) @ vt[:2]
    run, carry = runner(reduce, 4), start(reduce, grads)
    clean = carry.worker
    for _ in range(60):  # without the errors: the iteration alone
        total, carry = run(grads, Carry(clean, carry.shared), jax.random.key(0))
    np.testing.assert_allclose(total["kernel"][0], best, atol=1e-3 * np.abs(best).max())


def test_power_sgd_survives_a_step_without_gradient():
    reduce, grads = REDUCES["power_sgd"], draw(1, 2)
    run, carry = runner(reduce, 2), start(reduce, grads)
    _, carry = run(jax.tree.map(np.zeros_like, grads), carry, jax.random.key(0))
    total, _ = run(grads, carry, jax.random.key(0))
    kernel = np.asarray(total["blocks"]["up"]["kernel"][0])
    assert np.isfinite(kernel).all()
    assert (np.abs(kernel).max(axis=(1, 2)) > 0.1).all()


def test_power_sgd_leaves_matrices_that_the_rule_does_not_name():
    factors, grads = power_sgd(2, jax.random.key(0)), draw(1, 2)
    shapes = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), grads)
    rule = "blocks/.*/kernel"
    some, every = (factored_reduce(factors, matrices=m) for m in (rule, ".*"))
    total, carry = runner(some, 2)(grads, start(some, grads), jax.random.key(0))
    for name, has_factors in (("head", False), ("blocks", True)):
        exact = jax.tree.map(lambda g: g.sum(axis=0), grads[name])
        close = jax.tree.map(lambda t, e: np.allclose(t[0], e, atol=1e-6), total[name], exact)
        assert all(jax.tree.leaves(close)) != has_factors
        assert bool(jax.tree.leaves(carry.worker[name])) == has_factors
    whole = all_reduce().bytes_sent(shapes, 2)
    assert every.bytes_sent(shapes, 2) < some.bytes_sent(shapes, 2) < whole
    with pytest.raises(ValueError, match="no parameter matches 'hat'"):
        factored_reduce(factors, matrices="hat").bytes_sent(shapes, 2)


def test_int8_is_unbiased():
    codec, draws = int8(block=16), 4000
    x = jax.random.normal(jax.random.key(0), (32,))
    decode = lambda key: codec.decode(codec.encode(x, key))
    y = jax.vmap(decode)(jax.random.split(jax.random.key(1), draws))
    scale = np.abs(np.asarray(x)).reshape(2, 16).max(axis=1).repeat(16) / 127
    assert (np.abs(y - x) < scale * 1.001).all()
    # A draw has a standard deviation of at most half a level; 5 of those of the mean.
    assert (np.abs(y.mean(axis=0) - x) < 5 * scale / 2 / math.sqrt(draws)).all()
    # Rounding to nearest would miss this by far: most values do not lie on the grid.
    assert np.abs(y.std(axis=0)).mean() > 0.2 * scale.mean()


COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\("
)
ITEMSIZE = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "bf16": 2, "pred": 1}


def bytes_moved(text, workers):
    """What a worker sends by the collectives of a compiled program, done as rings."""
    factor = {"all-reduce": 2 * (workers - 1) / workers}
    total = 0
    for types, kind in COLLECTIVE.findall(text):
        size = sum(
            ITEMSIZE[t] * math.prod(int(d) for d in dims.split(",") if d)
            for t, dims in re.findall(r"(\w+)\[([\d,]*)\]", types)
        )
        total += size * factor.get(kind, (workers - 1) / workers)
    return total


@pytest.mark.variants(4)
@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("name", ["plain", "int8", "top_k", "power_sgd"])
def test_bytes_are_those_of_the_compiled_program(name, workers):
    reduce = REDUCES[name]
    grads = draw(0, workers)
    text = (
        runner(reduce, workers)
        .lower(grads, start(reduce, grads), jax.random.key(0))
        .compile()
        .as_text()
    )
    shapes = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), grads)
    assert bytes_moved(text, workers) == pytest.approx(reduce.bytes_sent(shapes, workers), rel=1e-6)


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_int8_sends_at_most_27_percent(workers):
    shapes = {"kernel": jax.ShapeDtypeStruct((4, 128, 512), jnp.float32)}
    sent = [r.bytes_sent(shapes, workers) for r in (exchange_reduce(int8()), all_reduce())]
    assert sent[0] <= 0.27 * sent[1]


@pytest.mark.variants(2)
@pytest.mark.parametrize("name", REDUCES)
def test_redistribute_keeps_what_is_owed(name):
    """And the new workers can go on with it."""
    reduce, grads = REDUCES[name], draw(1, 4)
    total, carry = runner(reduce, 4)(grads, start(reduce, grads), jax.random.key(0))
    like = jax.tree.map(lambda t: np.asarray(t[0]), total)
    for workers in (1, 2, 6):
        new = reduce.redistribute(carry, workers)
        difference = norm(subtract(debt(new, like), debt(carry, like)))
        assert difference <= 1e-5 * norm(debt(carry, like))
        more = draw(2, workers)
        _, after = runner(reduce, workers)(more, jax.device_get(new), jax.random.key(0))
        shapes = [jax.tree.map(jnp.shape, c) for c in (after, start(reduce, more))]
        assert shapes[0] == shapes[1]


def test_errors():
    with pytest.raises(ValueError, match="block is 0"):
        int8(0)
    for density in (0, 1.5):
        with pytest.raises(ValueError, match="density"):
            top_k(density)
    with pytest.raises(ValueError, match="rank is 0"):
        power_sgd(0, jax.random.key(0))
    with pytest.raises(ValueError, match="at least 1"):
        spread_error(Carry((), ()), 0)
