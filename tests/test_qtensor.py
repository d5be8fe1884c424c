"""Formats, rounding, the quantized matrix: exact grids, equality with what it stands for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.quantization.formats import FORMATS, Format, format_of
from compress.quantization.qtensor import QTensor, pack, unpack
from compress.quantization.rounding import find_scales, quantize

AXES = (-2, -1)
NAMES = sorted(FORMATS)
FEW = ["int4", "int8_zero_point", "q4_1", "q8_0", "e4m3"]  # one of each kind of arithmetic
IN, OUT = 128, 24


def weight(axis=-2, seed=0, layers=None, spread=1.0):
    shape = (IN, OUT) if axis == -2 else (OUT, IN)
    w = jax.random.normal(jax.random.key(seed), shape if layers is None else (layers, *shape))
    return w * spread + 0.3  # not symmetric about zero, so that offsets have something to do


pytestmark = pytest.mark.usefixtures("strict")


# Exactly GGUF


def blocks_of(q):
    """The blocks of 32 of one kernel [in, out], row by row of its transpose, as GGUF has them."""
    numbers = np.asarray(q.numbers()).T.reshape(-1, 32)
    scales = np.asarray(q.scales).T.reshape(-1, 1)
    offsets = None if q.offsets is None else np.asarray(q.offsets).T.reshape(-1, 1)
    return numbers, scales, offsets


def gguf_bytes(q, name):
    numbers, scales, offsets = blocks_of(q)
    if name == "q8_0":
        return np.concatenate([scales.view(np.uint8), numbers.view(np.uint8)], axis=1)
    nibbles = (numbers + (8 if name == "q4_0" else 0)).astype(np.uint8)
    body = nibbles[:, :16] | (nibbles[:, 16:] << 4)
    head = [scales] if offsets is None else [scales, offsets]
    return np.concatenate([*(h.view(np.uint8) for h in head), body], axis=1)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_gguf_reads_the_same_weights_bit_for_bit(name):
    gguf = pytest.importorskip("gguf")
    q = quantize(weight(), name)
    kind = getattr(gguf.GGMLQuantizationType, name.upper())
    read = gguf.quants.dequantize(gguf_bytes(q, name), kind).reshape(OUT, IN)
    np.testing.assert_array_equal(read.T, q.dequantize())


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_what_gguf_quantized_is_on_our_grid(name):
    """GGUF's own rounding gives weights that we quantize without any error."""
    gguf = pytest.importorskip("gguf")
    kind = getattr(gguf.GGMLQuantizationType, name.upper())
    rows = np.asarray(weight(-1))
    theirs = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    ours = np.asarray(quantize(jnp.asarray(theirs), name, -1).dequantize())
    # Q8_0 and Q4_1 blocks may not reach the ends of their grid: then our scale is another one.
    step = np.abs(theirs).max() / FORMATS[name].high
    assert np.abs(ours - theirs).max() <= step / 2 * 1.001
    if name == "q4_0":
        np.testing.assert_array_equal(ours, theirs)


# An independent formula


def by_numpy(w, format):
    """One group w [n], in NumPy and float64, from the definition of the grid."""
    w = np.asarray(w, np.float64)
    bits, minimum = format.bits, 0.0
    cut = np.float16 if format.scale_dtype == "float16" else lambda s: round_to_bits(s, 16)
    if format.offset == "minimum":
        scale, minimum = cut((w.max() - w.min()) / (2**bits - 1)), float(np.float16(w.min()))
        q = np.clip(np.round((w - minimum) / float(scale)), 0, 2**bits - 1)
    elif format.offset == "zero_point":
        low, high = min(w.min(), 0), max(w.max(), 0)
        scale = cut((high - low) / (2**bits - 1))
        zero = np.round(-low / scale)
        q = np.clip(np.round(w / scale) + zero, 0, 2**bits - 1) - zero
    elif format.span == "full":
        scale = cut(w[np.abs(w).argmax()] / -(2 ** (bits - 1)))
        q = np.clip(np.round(w / float(scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    else:
        scale = cut(np.abs(w).max() / (2 ** (bits - 1) - 1))
        top = 2 ** (bits - 1) - 1
        q = np.clip(np.round(w / float(scale)), -top, top)
    return q * float(scale) + minimum


def round_to_bits(x, bits):
    mantissa, exponent = np.frexp(x)
    return float(np.ldexp(np.round(mantissa * 2**bits), exponent - bits))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", [n for n in NAMES if FORMATS[n].kind == "int"])
def test_rounding_against_an_independent_formula(name, axis):
    format, w = FORMATS[name], weight(axis)
    columns = np.asarray(w if axis == -2 else w.T).T  # one output channel a row
    length = {"tensor": columns.size, "channel": IN}.get(format.group, format.group)
    groups = [by_numpy(g, format) for g in columns.reshape(-1, length)]
    expected = np.reshape(groups, (OUT, IN))
    got = np.asarray(quantize(w, name, axis).dequantize())
    got = got if axis == -1 else got.T
    # In float32 a weight may fall on the other side of a tie: rarely, and by one step.
    step = np.abs(expected).max() / (2.0 ** (format.bits - 1) - 1)
    assert np.isclose(got, expected, rtol=2e-6, atol=1e-7).mean() > 0.99
    np.testing.assert_allclose(got, expected, rtol=0, atol=step if name == "int16" else 1e-6)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_float8_against_numpy_types(name):
    import ml_dtypes

    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]
    w = np.asarray(weight())
    scale = np.array([round_to_bits(s, 16) for s in abs(w).max(0) / FORMATS[name].high], "float32")
    expected = (w / scale).astype(dtype).astype("float32") * scale
    np.testing.assert_allclose(quantize(jnp.asarray(w), name).dequantize(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_error_is_at_most_half_a_step(name):
    q, w = quantize(weight(), name), weight()
    groups = q.format.groups(IN)
    scales = np.repeat(np.abs(np.asarray(q.scales, "float32")), IN // groups, axis=0)
    # float8 steps grow with the number: 2^-3 or 2^-2 of it. In "full" the far end may be cut by one
    # step; a float16 scale or minimum may be too small for its group by 2^-11 of its extreme.
    relative = {"e4m3": 2.0**-4, "e5m2": 2.0**-3}.get(name)
    error = np.abs(np.asarray(q.dequantize() - w))
    slack = 1e-6 + np.abs(np.asarray(w)).max() * 2.0**-11 * (q.format.scale_dtype == "float16")
    if relative:
        assert (error <= relative * np.abs(np.asarray(w)) + scales * 2.0**-9).all()
    else:
        assert (error <= scales * (1.0 if q.format.span == "full" else 0.5) + slack).all()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("int8_zero_point", "q4_1")])
def test_what_is_representable_comes_back_bit_for_bit(name, axis):
    q = quantize(weight(axis), name, axis)
    again = quantize(q.dequantize(), name, axis)
    for one, two in zip(jax.tree.leaves(q), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ["int8_zero_point", "q4_1"])
def test_representable_with_offsets(name):
    """Numbers that reach both ends of the grid with scales that are powers of two."""
    format = FORMATS[name]
    numbers = jax.random.randint(jax.random.key(0), (IN, OUT), format.low, format.high + 1)
    numbers = numbers.at[::32].set(int(format.low)).at[1::32].set(int(format.high))
    w = numbers.astype(jnp.float32) * 0.125 + (0.5 if name == "q4_1" else 0.0)
    np.testing.assert_array_equal(quantize(w, name).dequantize(), w)


def test_a_search_never_raises_the_squared_error_and_helps_at_three_bits():
    for name in ("int3", "q4_0", "q4_1", "int8_zero_point"):
        w = weight()
        plain, found = (
            float(jnp.square(quantize(w, name, candidates=n).dequantize() - w).sum())
            for n in (1, 12)
        )
        assert found <= plain * (1 + 1e-6), name
        if FORMATS[name].bits == 3:
            assert found < 0.95 * plain, name


# The matrix that it stands for


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", [*FEW, "int16", "int8_tensor", "q4_0"])
def test_products_equal_those_of_the_dequantized_matrix(name, axis):
    q = quantize(weight(axis), name, axis)
    x = jax.random.normal(jax.random.key(1), (2, 3, IN))
    w = q if axis == -2 else q.T
    expected = x @ w.dequantize()
    scale = float(jnp.abs(x).max() * jnp.abs(w.dequantize()).max()) * IN**0.5
    for got in (x @ w, jax.jit(lambda x, w: x @ w)(x, w)):
        np.testing.assert_allclose(got, expected, atol=1e-6 * scale)
        assert got.dtype == x.dtype
    np.testing.assert_allclose((x @ w)[0, 0], x[0, 0] @ w, atol=1e-6 * scale)
    # The other way round nothing comes out of the sum, and it is still right.
    y = jax.random.normal(jax.random.key(1), (3, OUT))
    np.testing.assert_allclose(y @ w.T, y @ w.T.dequantize(), atol=1e-6 * scale)


def test_a_product_reaches_the_matrix_from_numpy_and_keeps_narrow_types():
    q = quantize(weight(), "int8")
    x = np.ones((2, IN), np.float32)
    np.testing.assert_allclose(x @ q, jnp.asarray(x) @ q)
    for dtype in (jnp.bfloat16, jnp.float16):
        y = jnp.asarray(x).astype(dtype) @ q
        assert y.dtype == dtype
        np.testing.assert_allclose(y.astype("float32"), jnp.asarray(x) @ q, rtol=0.01)
    # 65,535 is no float16 number: what has 16 bits is scaled before it is multiplied.
    wide = quantize(jnp.linspace(0, 1, IN * 2).reshape(IN, 2), Format(bits=16, offset="minimum"))
    assert jnp.isfinite(jnp.ones((1, IN), jnp.float16) @ wide).all()
    # 128 products of up to 1 * 127 pass the largest float16 number, unless summed in float32.
    big = quantize(jnp.full((1024, 2), 0.01), "int8")
    assert jnp.isfinite(jnp.ones((1, 1024), jnp.float16) @ big).all()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", FEW)
def test_taking_rows(name, axis):
    q = quantize(weight(axis), name, axis)
    ids = jnp.array([[0, 3, 3], [7, 11, 1]])
    taken = jax.jit(lambda q, ids: q.take(ids))(q, ids)
    np.testing.assert_array_equal(taken, q.dequantize()[ids])
    outside = q.take(jnp.array([0, 10_000]))
    assert jnp.isfinite(outside[0]).all()
    assert jnp.isnan(outside[1]).all()


@pytest.mark.parametrize("name", FEW)
def test_shape_and_transpose(name):
    q = quantize(weight(-1), name, -1)
    assert (q.shape, q.T.shape, q.ndim, q.size) == ((OUT, IN), (IN, OUT), 2, IN * OUT)
    assert q.T.values is q.values
    assert q.T.T == q
    np.testing.assert_array_equal(q.T.dequantize(), q.dequantize().T)
    half = quantize(weight(-1).astype(jnp.bfloat16), name, -1)
    assert half.dtype == half.dequantize().dtype == jnp.bfloat16
    assert half.dequantize(jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("name", FEW)
def test_a_stack_is_its_layers(name):
    stack = quantize(weight(layers=3), name)
    assert stack.shape == (3, IN, OUT)
    x = jax.random.normal(jax.random.key(1), (4, IN))
    layers = [quantize(w, name) for w in weight(layers=3)]
    expected = jnp.stack([x @ layer for layer in layers])

    scanned = jax.lax.scan(lambda _, w: (None, x @ w), None, stack)[1]
    mapped = jax.vmap(lambda w: x @ w)(stack)
    tolerance = 1e-6 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(scanned, expected, atol=tolerance)
    np.testing.assert_allclose(mapped, expected, atol=tolerance)
    for i, layer in enumerate(layers):
        one = jax.tree.map(lambda leaf, i=i: jax.lax.split(leaf, [1] * 3)[i].squeeze(0), stack)
        assert one.shape == (IN, OUT)
        np.testing.assert_array_equal(one.dequantize(), layer.dequantize())
    inside = jax.vmap(lambda w: quantize(w, name))(weight(layers=3))
    np.testing.assert_array_equal(inside.dequantize(), stack.dequantize())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("axis", AXES)
def test_packing_round_trip(bits, axis):
    for offset in ("none", "minimum", "zero_point"):
        format = Format(bits=bits, offset=offset)
        q = jax.random.randint(jax.random.key(0), (3, 8, 6), format.low, format.high + 1)
        packed = pack(q, format, axis)
        assert packed.dtype == jnp.uint8
        assert packed.size * 2 == q.size
        np.testing.assert_array_equal(unpack(packed, format, axis), q)


def test_bytes_are_what_the_format_says():
    bits = {name: 8 * quantize(jnp.ones((4096, 128)), name).nbytes / (4096 * 128) for name in NAMES}
    channel = 32 / 4096
    assert bits == pytest.approx(
        {
            "int3": 4 + channel,
            "int4": 4 + channel,
            "int8": 8 + channel,
            "int16": 16 + channel,
            "int8_tensor": 8 + 32 / (4096 * 128),
            "int8_zero_point": 8 + channel + 8 / 4096,
            "int3_g32": 4.5,
            "int4_g128": 4.125,
            "q4_0": 4.5,
            "q4_1": 5.0,
            "q8_0": 8.5,
            "e4m3": 8 + channel,
            "e5m2": 8 + channel,
        }
    )


def test_a_gradient_passes_through_the_product_to_its_input():
    q = quantize(weight(), "q4_0")
    x = jnp.ones((2, IN))
    got = jax.grad(lambda x: (x @ q).sum())(x)
    np.testing.assert_allclose(got, jnp.ones((2, OUT)) @ q.dequantize().T, rtol=1e-5)


def test_weights_of_nothing_and_scales_that_vanish():
    for name in FEW:
        assert not quantize(jnp.zeros((64, 4)), name).dequantize().any()
        tiny = quantize(jnp.full((64, 4), 1e-12), name)
        assert jnp.isfinite(tiny.dequantize()).all()


# Bad input


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        quantize(jnp.ones((32, 4)).at[3, 1].set(value), "q8_0")


def test_other_bad_input():
    cases = [
        (lambda: quantize(jnp.ones((48, 4)), "q4_0"), "groups of 32 do not divide.*groups of 16"),
        (lambda: quantize(jnp.ones((33, 4)), "int4"), "odd here: 33"),
        (lambda: quantize(jnp.ones((32, 4)) * 1e9, "q8_0"), "that float16 cannot hold"),
        (lambda: quantize(jnp.ones(32), "int8"), "only matrices"),
        (lambda: quantize(jnp.ones((32, 4), jnp.int32), "int8"), "only floating-point"),
        (lambda: quantize(jnp.ones((32, 4)), "int8", 0), "contraction axis is -1 or -2"),
        (lambda: quantize(jnp.ones((32, 4)), "int8", candidates=0), "0 candidates"),
        (lambda: quantize(jnp.ones((32, 4)), "int5"), "no format is called 'int5'; there are int3"),
        (lambda: Format(bits=12), "integers of 12 bits are not implemented"),
        (lambda: Format(kind="fp4"), "kind 'fp4' is unknown"),
        (lambda: Format(group=0), "a group is"),
        (lambda: Format(kind="e4m3", bits=4), "e4m3 has 8 bits"),
        (lambda: Format(span="full", offset="minimum"), 'span "full" is for'),
        (lambda: quantize(weight(layers=2), "int8").take(jnp.array([0])), "not of a stack"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_formats_are_values():
    assert format_of(dataclasses.replace(FORMATS["int8"])) == FORMATS["int8"]
    assert hash(FORMATS["q4_0"]) == hash(dataclasses.replace(FORMATS["q4_0"]))
    assert isinstance(quantize(weight(), "int8"), QTensor)
    assert find_scales(weight(), FORMATS["q4_0"], -2).scales.dtype == jnp.float16
