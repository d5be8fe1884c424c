"""The block with written-out collectives equals the plain one, in value and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from model.attention import Visibility
from model.block import Block
from model.positions import rotation
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from parallel.ring_matmul import all_gather_matmul, matmul_reduce_scatter
from parallel.tensor_block import FORMS, tensor_block

WIDE = {"dtype": "float64", "parameter_dtype": "float64"}
CONFIGS = {
    "gpt2": gpt2_tiny(dropout=0.0, **WIDE),
    "llama": llama_tiny(kv_heads=4, **WIDE),
    "modern": modern_tiny(**WIDE),
    "unscaled": modern_tiny(norm_scale=False, zero_init_projections=False, **WIDE),
}


def mesh_of(**axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=devices)


def setting(config, T=8):
    draw = np.random.default_rng(0)
    x, d = (jnp.asarray(draw.normal(size=(2, T, config.width))) for _ in range(2))
    turn = None
    if config.positions == "rotary":
        turn = rotation(jnp.arange(T)[None], config.head_width_, config.rotary_base)
    segments = jnp.asarray([[0] * 3 + [1] * (T - 3), [0] * T], jnp.int32)
    visibility = Visibility(segments=segments, window=4)
    arguments = (x, visibility, turn, None)
    shapes = jax.eval_shape(Block(config).init, jax.random.key(0), *arguments)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape)), shapes)
    return params, x, d, visibility, turn


def value_and_gradients(block, params, x, d, visibility, turn):
    def run(params, x):
        y, back = jax.vjp(lambda p, x: block(p, x, visibility, turn), params, x)
        return y, *back(d)

    return jax.device_get(jax.jit(run)(params, x))


CASES = [(name, form, 4) for name in CONFIGS for form in FORMS] + [("gpt2", "overlapped", 1)]
SLOW = {
    ("llama", "all_reduce"),
    ("llama", "sequence"),
    ("gpt2", "sequence"),
    ("modern", "all_reduce"),
    *(("unscaled", form) for form in FORMS if form != "overlapped"),
}


@pytest.mark.variants(2)
@pytest.mark.parametrize(
    ("name", "form", "devices"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[:2] in SLOW else []) for case in CASES],
)
def test_equals_the_plain_block(name, form, devices):
    config = CONFIGS[name]
    with jax.enable_x64():
        inputs = setting(config)
        plain = lambda p, x, *a: Block(config).apply({"params": p}, x, *a, None)[0]
        want = value_and_gradients(plain, *inputs)
        with jax.set_mesh(mesh_of(data=8 // devices, tensor=devices)):
            got = value_and_gradients(tensor_block(config, form), *inputs)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            # The gradient of a key bias is zero: softmax does not see a shift.
            assert np.linalg.norm(a - b) < 1e-10 * max(np.linalg.norm(b), 1)
        assert optax.tree.norm(want[1]) > 1


@pytest.mark.variants(1)
@pytest.mark.parametrize("form", FORMS)
def test_runs_under_strict_promotion(strict, form):
    config = modern_tiny()
    x = jnp.ones((2, 8, 32))
    block = Block(config)
    params = block.init(jax.random.key(0), x, Visibility(), None, None)["params"]
    with jax.set_mesh(mesh_of(tensor=4)):
        step = jax.grad(lambda p: tensor_block(config, form)(p, x, Visibility(), None).sum())
        jax.eval_shape(step, params)


def test_collectives_are_those_of_the_form():
    """Counted in the forward pass: two halves, each entered and left once."""
    config = gpt2_tiny(dropout=0.0)
    x = jnp.ones((2, 8, 32))
    params = Block(config).init(jax.random.key(0), x, Visibility(), None, None)["params"]

    def count(form, devices=4):
        with jax.set_mesh(mesh_of(tensor=devices)):
            jaxpr = jax.make_jaxpr(tensor_block(config, form))(params, x, Visibility(), None)
        names = re.findall(
            r"= (psum_invariant|psum|all_gather|reduce_scatter|ppermute)\b", str(jaxpr)
        )
        return {name: names.count(name) for name in sorted(set(names))}

    assert sum(count("all_reduce").values()) == 2
    assert count("sequence") == {"all_gather": 2, "reduce_scatter": 2}
    assert count("overlapped") == {"ppermute": 4 * (4 - 1)}


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_ring_products_equal_plain_ones(strict, devices):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(2, 8, 6)), jnp.float32)
    up, down = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((6, 16), (16, 6)))
    mesh = mesh_of(tensor=devices)
    time, columns = P(None, "tensor"), P(None, None, "tensor")
    first = jax.shard_map(
        lambda x, a, b: all_gather_matmul(x, [a, b]),
        mesh=mesh,
        in_specs=(time, time, time),
        out_specs=columns,
    )
    h, twice = jax.jit(first)(x, up, 2 * up)
    np.testing.assert_allclose(h, x @ up, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(twice, 2 * (x @ up), rtol=1e-5, atol=1e-5)
    second = jax.shard_map(
        matmul_reduce_scatter, mesh=mesh, in_specs=(columns, P("tensor")), out_specs=time
    )
    np.testing.assert_allclose(jax.jit(second)(h, down), x @ up @ down, rtol=1e-4, atol=1e-4)


def test_errors():
    config = llama_tiny()
    with pytest.raises(ValueError, match="choose one of all_reduce, sequence, overlapped"):
        tensor_block(config, "ring")
    with pytest.raises(ValueError, match=r"dropout, but it is 0\.1"):
        tensor_block(gpt2_tiny())
    block = tensor_block(config, "sequence")
    with pytest.raises(ValueError, match="'tensor', but the mesh has no axes"):
        block({}, jnp.ones((1, 8, 32)), Visibility(), None)
    with (
        jax.set_mesh(mesh_of(tensor=4)),
        pytest.raises(ValueError, match="2 key/value heads do not divide over 4 devices"),
    ):
        block({}, jnp.ones((1, 8, 32)), Visibility(), None)
    with (
        jax.set_mesh(mesh_of(tensor=2)),
        pytest.raises(ValueError, match="7 tokens do not divide over 2 devices"),
    ):
        block({}, jnp.ones((1, 7, 32)), Visibility(), None)
