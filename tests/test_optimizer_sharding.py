"""Every optimizer of the table computes the same whether or not its work is divided."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.mesh import make_mesh
from tests.test_optimizer_contract import (
    STEPS,
    VALUE,
    by_path,
    every_optimizer,
    random_tree,
    settings_of,
)
from train.optimizers.table import build
from train.schedules import Constant


@every_optimizer(2)
def test_sharded_equals_unsharded(name):
    """On eight devices, parameters and state divided over two axes and the work over all."""
    sizes = {"token_embedding": {"embedding": (8, 8)}, "head": {"kernel": (8, 8)}}
    sizes["blocks"] = {"mlp": {"up": {"kernel": (3, 8, 8), "bias": (3, 8)}}}
    like = jax.tree.map(
        lambda size: jax.ShapeDtypeStruct(size, jnp.float32),
        sizes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    params = random_tree(0, like)
    tx = build(settings_of(name), Constant(), STEPS, like)

    def three(params, state):
        for step in range(3):
            grads = random_tree(1 + step, like)
            updates, state = tx.update(grads, state, params, value=VALUE)
            params = optax.apply_updates(params, updates)
        return params, state

    expected, _ = jax.jit(lambda p: three(p, tx.init(p)))(params)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    specs = {
        "token_embedding": {"embedding": P("tensor", "fsdp")},
        "head": {"kernel": P("fsdp", "tensor")},
        "blocks": {"mlp": {"up": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")}}},
    }
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        got, _ = jax.jit(lambda p: three(p, tx.init(p)), out_shardings=(shardings, None))(placed)
    for path, end in by_path(expected).items():
        moved = np.abs(end - by_path(params)[path]).max()
        np.testing.assert_allclose(
            by_path(got)[path], end, rtol=1e-5, atol=2e-3 * float(moved), err_msg=path
        )
