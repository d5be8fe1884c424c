"""Compiles what `shard_map` functions say themselves, for TPUs; a process of its own.

python tests/tpu_programs.py CHIP DEVICES        prints JSON: program -> "" or what went wrong
"""

import json
import sys

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

from experiments.plan.compile import topology_of
from model.attention import Visibility
from model.block import Block
from model.presets import modern_tiny
from model.transformer import Transformer
from parallel import parameter_server
from parallel.chips import chip_named
from parallel.mesh import make_mesh
from parallel.spread import spread
from parallel.tensor_block import FORMS, tensor_block
from train.losses import cross_entropy, loss_function
from train.plugs import Context

CONFIG = modern_tiny(scan_layers=True, heads=8, width=64, head_width=8)


def block(form, mesh):
    """A tensor-parallel block with its gradients; "overlapped" is the ring collective matmul."""
    x = jax.ShapeDtypeStruct((2, 16, CONFIG.width), jnp.float32)
    shapes = jax.eval_shape(Block(CONFIG).init, jax.random.key(0), x, Visibility(), None, None)
    run = tensor_block(CONFIG, form)

    def gradients(params, x):
        return jax.grad(lambda p, x: run(p, x, Visibility(), None).sum(), (0, 1))(params, x)

    return everywhere(mesh, gradients, shapes["params"], x)


def server(mesh):
    """A step of the synchronous parameter server."""
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    model, term = Transformer(CONFIG), cross_entropy()
    params = model.init(jax.random.key(0), jnp.zeros(tokens.shape, tokens.dtype))["params"]
    optimizer = optax.adam(1e-3)
    state = parameter_server.init_server(params, optimizer, mesh.shape["data"])
    step = parameter_server.server_step(loss_function(model, [term]), optimizer, params)
    weights = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    batch = {"tokens": tokens, "targets": tokens, "weights": weights}

    def run(state, batch):
        context = Context(jnp.int32(0), jax.random.key(0), {}, {}, {term.name: jnp.float32(128)})
        return step(state, batch, context)

    return everywhere(mesh, run, state, batch)


def roots(mesh):
    """Eigenvalues of twelve matrices on eight chips, each its share, as Shampoo's are found."""
    x = jax.ShapeDtypeStruct((12, 16, 16), jnp.float32)
    return everywhere(mesh, lambda x: spread(jnp.linalg.eigvalsh, x + x.mT), x)


def everywhere(mesh, function, *shapes):
    whole = jax.NamedSharding(mesh, jax.P())
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes
    )
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*placed).compile().as_text()


def main(name, devices):
    topology = topology_of(chip_named(name), int(devices))
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    along = {axis: make_mesh(**{"data": 1, axis: int(devices)}, devices=chips) for axis in
             ("data", "tensor")}  # fmt: skip
    programs = {f"tensor_block {form}": (block, (form, along["tensor"])) for form in FORMS}
    programs["parameter_server"] = (server, (along["data"],))
    programs["spread"] = (roots, (along["data"],))
    found = {}
    for label, (make, arguments) in programs.items():
        try:
            make(*arguments)
            found[label] = ""
        except Exception as error:
            found[label] = repr(error)[:500]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
