"""Attention in the form of XLA:CPU: equal to the plain one, wherever it may stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from model import attention
from model.attention import Visibility, dot_product_attention
from model.dropout import Dropout

KEY = jax.random.key(0)
SEGMENTS = (jnp.arange(10)[None] > jnp.array([[3], [6]])).astype(jnp.int32)
SEEN = {
    "all": Visibility(),
    "window": Visibility(window=3),
    "documents": Visibility(segments=SEGMENTS),
    "both": Visibility(segments=SEGMENTS, window=5),
}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Ten queries are three blocks, the last of them short."""
    monkeypatch.setattr(attention, "BLOCK", 4)


def inputs(dtype=jnp.float32, kv_heads=2):
    shapes = {"q": (2, 10, 4, 8), "k": (2, 10, kv_heads, 8), "v": (2, 10, kv_heads, 8)}
    keys = jax.random.split(KEY, 3)
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes.values(), strict=True)]


def weighted(platform, visibility=SEEN["all"]):
    """A scalar of the output that every element of it enters with another weight."""

    def value(q, k, v):
        out = dot_product_attention(q, k, v, visibility, platform=platform)
        weights = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
        return jnp.sum(jnp.sin(out) * weights)

    return value


def outcome(function, arrays):
    return jax.jit(jax.value_and_grad(function, (0, 1, 2)))(*arrays)


def assert_close(one, other, tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("seen", SEEN)
def test_the_form_for_cpu_has_the_values_and_gradients_of_the_plain_one(strict, seen):
    arrays = inputs()
    blocked = outcome(weighted("cpu", SEEN[seen]), arrays)
    assert_close(blocked, outcome(weighted("gpu", SEEN[seen]), arrays), 1e-5)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_it_does_so_in_float64_and_for_any_number_of_key_heads(kv_heads):
    with jax.enable_x64(True):
        arrays = inputs(jnp.float64, kv_heads)
        blocked = outcome(weighted("cpu", SEEN["window"]), arrays)
        assert_close(blocked, outcome(weighted("gpu", SEEN["window"]), arrays), 1e-10)


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_form(strict):
    arrays = inputs(jnp.bfloat16)
    exact = outcome(weighted("gpu"), [a.astype(jnp.float32) for a in arrays])[1]

    def error(platform):
        gradients = outcome(weighted(platform), arrays)[1]
        apart = [g.astype(jnp.float32) - e for g, e in zip(gradients, exact, strict=True)]
        return np.array([np.linalg.norm(a) for a in apart])

    assert (error("cpu") < 1.5 * error("gpu")).all()


@pytest.mark.parametrize("around", ["vmap", "scan", "remat"])
def test_it_may_stand_inside(around, strict):
    arrays = [jnp.stack([a, 2 * a]) for a in inputs()]

    def total(platform):
        one = weighted(platform)
        if around == "vmap":
            return lambda *stacks: jax.vmap(one)(*stacks).sum()
        body = jax.checkpoint(one) if around == "remat" else one

        def scanned(*stacks):
            return jax.lax.scan(lambda sum, x: (sum + body(*x), None), jnp.float32(0), stacks)[0]

        return scanned

    assert_close(outcome(total("cpu"), arrays), outcome(total("gpu"), arrays), 1e-5)


def test_it_partitions_over_batch_and_heads():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    arrays = inputs()
    placed = [jax.device_put(a, spec) for a in arrays]
    assert_close(outcome(weighted("cpu"), placed), outcome(weighted("gpu"), arrays), 1e-5)


def test_in_a_shard_map_the_plain_form_is_taken():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    arrays = inputs()

    def attend(platform):
        def inside(q, k, v):
            return dot_product_attention(q, k, v, platform=platform)

        return jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec))

    assert attend("cpu").lower(*arrays).as_text() == attend("gpu").lower(*arrays).as_text()


@pytest.mark.parametrize("why", ["cache", "dropout"])
def test_with_a_cache_or_dropout_the_plain_form_is_taken(why):
    first = jnp.zeros((2,), jnp.int32) if why == "cache" else None
    dropout = Dropout(0.5, KEY) if why == "dropout" else None

    def text(platform):
        def attend(q, k, v):
            return dot_product_attention(q, k, v, Visibility(first), dropout, platform)

        return jax.jit(attend).lower(*inputs()).as_text()

    assert text("cpu") == text("gpu")
