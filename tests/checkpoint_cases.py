"""States, folders and processes that tests of checkpoints share."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.checkpoints import (
    Checkpoints,
    CheckpointSettings,
)
from train.manifest import MANIFEST

ROOT = Path(__file__).parents[1]


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    optimizer: tuple
    rng: jax.Array
    extra: dict


@jax.tree_util.register_pytree_node_class
class Packed:
    """A node without keys of its own: two codes in a byte, and a static shape."""

    def __init__(self, codes, scale, shape):
        self.codes, self.scale, self.shape = codes, scale, shape

    def tree_flatten(self):
        return (self.codes, self.scale), self.shape

    @classmethod
    def tree_unflatten(cls, shape, children):
        codes, scale = children
        return cls(codes, scale, shape)


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey("x")
        return ((key, jnp.ones(1)), (key, jnp.ones(2))), None

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls()


class Pair(NamedTuple):
    first: jax.Array
    second: tuple


def realistic(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    params = {
        "embedding": jax.random.normal(next(keys), (7, 4)),
        "blocks": {
            "attention": {"q": {"kernel": jax.random.normal(next(keys), (2, 4, 4))}},
            "norm": {"scale": jax.random.normal(next(keys), (2, 4), jnp.bfloat16)},
        },
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(1e-3), {"embedding": True, "blocks": False}),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 9)),
    )
    extra = {
        "mask": jax.random.bernoulli(next(keys), 0.5, (3, 5)),
        "packed": Packed(jnp.arange(6, dtype=jnp.uint8), jnp.float16(0.25), (3, 4)),
        "nothing yet": jnp.zeros((0, 4)),
        "odd/name.[0]%é": Pair(jnp.int8(-3), (jnp.full((2,), 1.5), None, ())),
        "metrics": {"empty": {}},
        "keys": jax.random.split(next(keys), 3),
        "other": jax.random.key(1, impl="rbg"),
    }
    return State(jnp.int32(7), params, tx.init(params), next(keys), extra)


def bits(leaf):
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()


def weak(leaf):
    return getattr(leaf, "weak_type", False)  # a typed key has none


def assert_same(a, b):
    one: object = jax.tree.structure(a)
    assert one == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype, weak(x)) == (y.shape, y.dtype, weak(y))
        assert bits(x) == bits(y)


def abstract(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree
    )


def small(value):
    return {"params": {"w": jnp.full((64,), value, jnp.float32)}, "step": jnp.int32(value)}


def fill(folder, steps=(1, 2, 3), **settings):
    with Checkpoints(folder, CheckpointSettings(**{"keep_last": 9, **settings})) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step), {"phase": step})


def mesh(*shape):
    axes = tuple("ab"[: len(shape)])
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(
        shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(shape), devices=devices
    )


def child(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def largest(folder, part=""):
    files = [p for p in (folder / part).rglob("*") if p.is_file() and p.name != MANIFEST]
    return max(files, key=lambda p: p.stat().st_size)


def flip_a_bit(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.name
