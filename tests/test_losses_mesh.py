"""On a mesh, a device computes the head for its own rows and its own stretch of time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from model.presets import modern_tiny
from model.transformer import Transformer
from parallel.mesh import make_mesh
from train.losses import counts_of, cross_entropy, loss_function, z_loss
from train.plugs import Context

B, T, V = 8, 32, 1024
TERMS = [cross_entropy(), z_loss()]
MODEL = Transformer(modern_tiny(vocabulary_size=V, layers=1))


def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, targets = (jax.random.randint(key, (B, T), 0, V) for key in keys[:2])
    weights = (jax.random.uniform(keys[2], (B, T)) > 0.2).astype(jnp.float32)
    return MODEL.init(keys[0], tokens[:1])["params"], {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
    }


def gradient(chunk):
    loss = loss_function(MODEL, TERMS, chunk=chunk)

    def value(params, batch):
        context = Context(jnp.int32(0), None, {}, {}, counts_of(TERMS, batch))
        return loss(params, batch, context)[0]

    return jax.value_and_grad(value)


@pytest.mark.parametrize("chunk", [None, 64, 24])
@pytest.mark.parametrize("axes", [{"data": 8}, {"context": 8}, {"data": 2, "context": 4}])
def test_the_head_is_divided(axes, chunk):
    params, batch = arguments()
    want, wanted = jax.jit(gradient(None))(params, batch)
    sizes = {"data": 1, **axes}
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data", "context" if sizes.get("context", 1) > 1 else None)
        batch = jax.device_put(batch, NamedSharding(mesh, spec))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        program = jax.jit(gradient(chunk)).lower(params, batch).compile()
        found, grads = program(params, batch)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, grads, wanted)
    # No device ever holds the logits of more than its share of the positions at a time.
    at_a_time = B * T // 8 if chunk is None else -(-chunk // 8)
    held = [np.prod(shape) for shape in shapes_in(program.as_text()) if V in shape]
    assert max(held) <= max(at_a_time, MODEL.config.width) * V


def shapes_in(text):
    """The shapes of all arrays that a compiled program names."""
    return [tuple(map(int, s.split(","))) for s in re.findall(r"f32\[(\d+(?:,\d+)+)\]", text)]
