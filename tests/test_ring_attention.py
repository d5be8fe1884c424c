"""Ring attention equals full attention, whatever is visible and however the mesh is cut."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from model.attention import Visibility, dot_product_attention
from model.dropout import Dropout
from model.presets import gpt2_tiny, modern_tiny
from model.rules import match
from model.transformer import Transformer
from parallel.ring_attention import ring_attention, ring_bytes
from parallel.ring_layout import natural_order, zigzag, zigzag_order


def mesh_of(**axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=devices)


def inputs(dtype, B=2, T=32, H=4, G=2, K=8, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K)]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def value_and_gradients(attention, q, k, v, d, visibility):
    @jax.jit
    def run(q, k, v, visibility):
        out, back = jax.vjp(lambda *a: attention(*a, visibility, None), q, k, v)
        return (out, *back(d))

    return run(q, k, v, visibility)


@contextlib.contextmanager
def strictly():
    """Not the fixture: full attention, beside it, promotes types in float64."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def relative_distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def segments_of(B, T, seed=0):
    starts = np.random.default_rng(seed).random((B, T)) < 0.15
    return jnp.asarray(starts.cumsum(axis=1), jnp.int32)


CASES = {
    "causal": (4, Visibility(), {}),
    "one device, window": (1, Visibility(window=jnp.int32(5)), {}),
    "two devices, segments": (2, Visibility(segments=segments_of(2, 32)), {}),
    "both": (4, Visibility(segments=segments_of(2, 32), window=jnp.int32(9)), {"tile": 3}),
    "eight devices, window": (8, Visibility(window=12), {"tile": 1}),
}


def compare(case, dtype):
    devices, visibility, options = CASES[case]
    q, k, v, d = inputs(dtype)
    want = value_and_gradients(dot_product_attention, q, k, v, d, visibility)
    order, back = zigzag_order(32, devices), natural_order(32, devices)
    if visibility.segments is not None:
        visibility = visibility._replace(segments=visibility.segments[:, order])
    with strictly(), jax.set_mesh(mesh_of(context=devices)):
        laid = [a[:, order] for a in (q, k, v, d)]
        got = value_and_gradients(ring_attention(**options), *laid, visibility)
    return [relative_distance(np.asarray(g)[:, back], w) for g, w in zip(got, want, strict=True)]


@pytest.mark.variants(1)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("causal", marks=pytest.mark.slow),
        "one device, window",
        "two devices, segments",
        "both",
        pytest.param("eight devices, window", marks=pytest.mark.slow),
    ],
)
def test_equals_full_attention_in_float64(case):
    with jax.enable_x64():
        assert max(compare(case, jnp.float64)) < 1e-10


def test_equals_full_attention_in_float32():
    assert max(compare("both", jnp.float32)) < 1e-5


CONFIGS = {
    "gpt2": gpt2_tiny(dropout=0.0),
    "modern": modern_tiny(
        kv_heads=2, window=(3, 7), remat="full", scan_layers=True, zero_init_projections=False
    ),
}
# Queries, keys, values and the first kernels cut by columns, the second kernels by rows.
TENSOR_RULES = [
    ("(attention/(q|k|v)|mlp/(up|gate))/kernel", P(None, None, "tensor")),
    ("(attention/o|mlp/down)/kernel", P(None, "tensor")),
]


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "modern"])
def test_a_transformer_on_data_context_and_tensor_axes(name):
    """A model, its loss and its gradients, sharded over three axes at once."""
    config = dataclasses.replace(CONFIGS[name], dtype="float64", parameter_dtype="float64")
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 64)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "segments": segments_of(2, 16)}

    def run(model, params, batch):
        def loss(params, batch):
            logits = model.apply(
                {"params": params}, batch["tokens"], batch.get("positions"), batch["segments"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            return losses.mean()

        return jax.jit(jax.value_and_grad(loss))(params, batch)

    with jax.enable_x64():
        plain = Transformer(config)
        shapes = jax.eval_shape(plain.init, jax.random.key(1), tokens)["params"]
        draw = np.random.default_rng(2)
        # Every parameter drawn at a visible scale, so that no part of the model is at rest.
        params = jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape)), shapes)
        want = jax.device_get(run(plain, params, batch))
        mesh = mesh_of(data=2, context=2, tensor=2)
        specs = match(TENSOR_RULES, params, default=P())
        with jax.set_mesh(mesh):
            place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
            params = jax.tree.map(place, params, specs)
            laid = {name: place(a, P("data", "context")) for name, a in zigzag(batch, 2).items()}
            got = run(Transformer(config, attention=ring_attention(tile=2)), params, laid)
            got = jax.device_get(got)
        assert abs(got[0] - want[0]) < 1e-10 * want[0]
        difference = jax.tree.map(np.subtract, got[1], want[1])
        assert optax.tree.norm(difference) < 1e-10 * optax.tree.norm(want[1])


def test_places_matter():
    """Rows laid out plainly give another result: the layout is no formality."""
    q, k, v, _ = inputs(jnp.float32)
    with jax.set_mesh(mesh_of(context=2)):
        got = jax.jit(ring_attention())(q, k, v)
    assert relative_distance(got, dot_product_attention(q, k, v)) > 0.1


def temporary_bytes(attention, T, axes):
    """Of the gradient, for each device."""
    shape = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
    loss = lambda q, k, v: attention(q, k, v, Visibility(), None).sum()
    with jax.set_mesh(mesh_of(**axes)):
        spec = P(None, "context") if axes["context"] > 1 else P()
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), in_shardings=spec, out_shardings=spec)
        return step.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_time_over_devices():
    """Twice the row, twice the memory (full attention: four times); twice the devices, half."""
    ring = ring_attention(tile=32)
    at_2k, at_4k = (temporary_bytes(ring, T, {"context": 4}) for T in (2048, 4096))
    assert at_4k < 2.05 * at_2k
    assert temporary_bytes(ring, 4096, {"context": 8}) < 0.55 * at_4k
    full = [temporary_bytes(dot_product_attention, T, {"context": 1}) for T in (2048, 4096)]
    assert full[1] > 3.5 * full[0]


def sent(jaxpr):
    """Bytes of all hops in a jaxpr, times the trip counts around them."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            total += sum(a.aval.size * a.aval.dtype.itemsize for a in equation.invars)
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += sum(trips * sent(inner) for inner in jaxprs_in_params(equation.params))
    return total


@pytest.mark.variants(1)
@pytest.mark.parametrize(("devices", "packed"), [(2, False), (4, True), (8, False)])
def test_bytes_are_those_of_the_formula(devices, packed):
    q, k, v, d = inputs(jnp.bfloat16)
    visibility = Visibility(segments=segments_of(2, 32) if packed else None)
    attend = lambda q, k, v: ring_attention()(q, k, v, visibility, None)
    with jax.set_mesh(mesh_of(context=devices)):
        forward = sent(jax.make_jaxpr(attend)(q, k, v).jaxpr)
        both = sent(jax.make_jaxpr(lambda *a: jax.vjp(attend, *a)[1](d))(q, k, v).jaxpr)
    keys = jax.ShapeDtypeStruct(k.shape, k.dtype)
    want = ring_bytes(keys, devices, segments=packed)
    assert {"forward": forward, "backward": both - forward} == want


def test_zigzag_and_its_inverse():
    order = zigzag_order(24, 3)
    assert sorted(order.tolist()) == list(range(24))
    np.testing.assert_array_equal(order[natural_order(24, 3)], np.arange(24))
    # Each device has the same number of visible (query, key) pairs.
    assert {int((places + 1).sum()) for places in order.reshape(3, 8)} == {100}


def test_zigzag_permutes_every_array_of_the_tokens_alone():
    batch = {
        "tokens": jnp.arange(16).reshape(2, 8),
        "positions": jnp.arange(16).reshape(2, 8) % 3,
        "hidden": jnp.arange(32).reshape(2, 8, 2),
        "values": jnp.arange(2),
    }
    laid = zigzag(batch, 2)
    order = zigzag_order(8, 2)
    assert laid.keys() == batch.keys()
    for name in ("tokens", "positions", "hidden"):
        np.testing.assert_array_equal(laid[name], np.asarray(batch[name])[:, order])
    np.testing.assert_array_equal(laid["values"], batch["values"])


def test_errors():
    q, k, v, _ = inputs(jnp.float32)
    ring = ring_attention()
    with pytest.raises(ValueError, match=r"mesh axis 'context', but the mesh has no axes"):
        ring(q, k, v, Visibility(), None)
    with pytest.raises(ValueError, match="at least 1"):
        ring_attention(tile=0)
    with pytest.raises(ValueError, match="make it a multiple of 6"):
        zigzag({"tokens": q[..., 0, 0]}, 3)
    with jax.set_mesh(mesh_of(data=2)), pytest.raises(ValueError, match=r"has \{'data': 2\}"):
        ring(q, k, v, Visibility(), None)
    with jax.set_mesh(mesh_of(context=2)):
        with pytest.raises(ValueError, match="dropout"):
            ring(q, k, v, Visibility(), Dropout(0.1, jax.random.key(0)))
        with pytest.raises(ValueError, match="cache"):
            ring(q, k, v, Visibility(first=jnp.zeros(2, jnp.int32)), None)
        with pytest.raises(ValueError, match="30 tokens does not divide into 2 chunks"):
            ring(q[:, :30], k[:, :30], v[:, :30], Visibility(), None)
        with pytest.raises(ValueError, match="32 queries, not 16"):
            ring(q, k[:, :16], v[:, :16], Visibility(), None)
