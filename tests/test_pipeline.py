"""A pipeline equals its layers in a row; its idle time equals the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from model.attention import Visibility
from model.block import Block
from model.positions import rotation
from model.presets import llama_tiny
from model.rules import match
from parallel.pipeline import bubble, piece_of, pipeline, steps_of

CONFIG = llama_tiny(layers=4, dtype="float64", parameter_dtype="float64")


def mesh_of(**axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=devices)


def layers(params, x):
    """Any number of toy layers; the second part of x rides along."""
    body = lambda h, p: (
        h + jnp.tanh(h @ p["kernel"] + p["bias"][None]) * x["scale"][:, None],
        None,
    )
    h, _ = jax.lax.scan(body, x["h"], params)
    return {**x, "h": h}


def toy(L=8, B=8, D=5):
    draw = np.random.default_rng(0)
    make = lambda *s: jnp.asarray(draw.normal(size=s))
    params = {"kernel": make(L, D, D), "bias": make(L, D)}
    return params, {"h": make(B, D), "scale": make(B)}, make(B, D)


def value_and_gradients(run, params, x, d):
    loss = lambda params, x: (run(params, x)["h"] * d).sum()
    return jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x))


def relative_distance(a, b):
    difference = jax.tree.map(np.subtract, a, b)
    return float(optax.tree.norm(difference) / optax.tree.norm(b))


@pytest.mark.variants(2)
@pytest.mark.parametrize(
    ("devices", "micro_batches", "rounds"),
    [(4, 4, 1), (4, 2, 1), (2, 8, 1), (4, 4, 2), (2, 4, 4), (1, 2, 2), (8, 8, 1)],
)
def test_equals_the_layers_in_a_row(devices, micro_batches, rounds):
    with jax.enable_x64():
        params, x, d = toy()
        want = value_and_gradients(layers, params, x, d)
        with jax.set_mesh(mesh_of(data=8 // devices, pipeline=devices)):
            run = pipeline(layers, micro_batches, rounds=rounds)
            with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
                got = value_and_gradients(run, params, x, d)
        for a, b in zip(got, want, strict=True):
            assert relative_distance(a, b) < 1e-10


def test_whole_output_and_what_rides_along():
    params, x, _ = toy()
    with jax.set_mesh(mesh_of(pipeline=4)):
        got = jax.jit(pipeline(jax.checkpoint(layers), 4, rounds=2))(params, x)
    np.testing.assert_allclose(got["h"], layers(params, x)["h"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got["scale"], x["scale"])


@pytest.mark.slow
def test_transformer_blocks_on_data_pipeline_and_tensor_axes():
    c, T = CONFIG, 8
    block = Block(c)
    turn = lambda: rotation(jnp.arange(T)[None], c.head_width_, c.rotary_base)

    def stage(params, x):
        def body(h, p):
            return block.apply({"params": p}, h, Visibility(segments=x["segments"]), turn(), None)[
                0
            ], None

        return {**x, "h": jax.lax.scan(body, x["h"], params)[0]}

    with jax.enable_x64():
        draw = np.random.default_rng(0)
        h, d = (jnp.asarray(draw.normal(size=(4, T, c.width))) for _ in range(2))
        x = {"h": h, "segments": jnp.asarray(draw.integers(0, 2, (4, T)).cumsum(1), jnp.int32)}
        shapes = jax.eval_shape(block.init, jax.random.key(0), h, Visibility(), turn(), None)[
            "params"
        ]
        params = jax.tree.map(
            lambda s: jnp.asarray(0.2 * draw.normal(size=(c.layers, *s.shape))), shapes
        )

        def value_and_gradients(run, params, x):
            loss = lambda p, h: (run(p, {**x, "h": h})["h"] * d).sum()
            return jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x["h"]))

        want = value_and_gradients(stage, params, x)
        mesh = mesh_of(data=2, pipeline=2, tensor=2)
        rules = [
            ("(q|k|v|up|gate)/kernel", P("pipeline", None, "tensor")),
            ("(o|down)/kernel", P("pipeline", "tensor")),
        ]
        with jax.set_mesh(mesh):
            place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
            sharded = jax.tree.map(place, params, match(rules, params, default=P("pipeline")))
            laid = jax.tree.map(lambda a: place(a, P("data")), x)
            got = value_and_gradients(pipeline(stage, 2), sharded, laid)
    for a, b in zip(got, want, strict=True):
        assert relative_distance(a, b) < 1e-10


def executions(jaxpr, name):
    """How often a device runs the function `name`, counted by the trip counts around its calls."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit") and equation.params["name"] == name:
            total += 1
            continue
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += trips * executions(inner, name)
    return total


@pytest.mark.parametrize(
    ("devices", "micro_batches", "rounds"), [(4, 4, 1), (4, 8, 1), (4, 4, 2), (2, 8, 4), (8, 8, 1)]
)
def test_idle_time_is_that_of_the_formula(devices, micro_batches, rounds):
    """Useful stage executions over all, from the trip counts in the jaxpr."""
    params, x, _ = toy()

    @jax.jit
    def marked(params, x):
        return layers(params, x)

    with jax.set_mesh(mesh_of(pipeline=devices)):
        jaxpr = jax.make_jaxpr(pipeline(marked, micro_batches, rounds=rounds))(params, x).jaxpr
    run = devices * executions(jaxpr, "marked")
    useful = micro_batches * devices * rounds  # every micro-batch passes every stage once
    assert useful / run == pytest.approx(1 - bubble(devices, micro_batches, rounds))


@pytest.mark.parametrize(
    ("devices", "micro_batches", "rounds"), [(4, 3, 1), (4, 8, 1), (4, 8, 2), (2, 6, 3)]
)
def test_every_piece_is_done_once_when_its_input_is_there(devices, micro_batches, rounds):
    done = {}
    for step in range(steps_of(devices, micro_batches, rounds)):
        for device in range(devices):
            piece = piece_of(np.int32(step), np.int32(device), devices, micro_batches, rounds)
            if piece.useful:
                key = (int(piece.micro_batch), int(piece.round) * devices + device)
                assert key not in done
                done[key] = step
    assert len(done) == micro_batches * rounds * devices
    for (micro_batch, stage), step in done.items():
        assert stage == 0 or done[micro_batch, stage - 1] == step - 1


def test_errors():
    params, x, _ = toy()
    with pytest.raises(ValueError, match="not 0 and 1"):
        pipeline(layers, 0)
    with pytest.raises(ValueError, match="'pipeline', but the mesh has no axes"):
        pipeline(layers, 2)(params, x)
    with jax.set_mesh(mesh_of(pipeline=4)):
        with pytest.raises(ValueError, match="8 layers do not divide into 3 rounds of 4 stages"):
            pipeline(layers, 4, rounds=3)(params, x)
        with pytest.raises(ValueError, match="8 rows does not divide into 3 micro-batches"):
            pipeline(layers, 3)(params, x)
        with pytest.raises(ValueError, match="2 micro-batches do not fill groups of 4"):
            pipeline(layers, 2, rounds=2)(params, x)
