"""8-bit optimizer state: the grid's bound, and training that is nearly the one of float state."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress.quantization.optimizer_state import decode, eight_bit, encode
from model.presets import gpt2_tiny
from model.rules import leaf_paths
from model.transformer import Transformer
from train.optimizers import OPTIMIZERS, build
from train.optimizers.averaging import tail_average
from train.schedules import Constant

BOUND = 2 ** (1 / 16) - 1


def spread(shape, octaves, seed=0):
    """Numbers of very different sizes."""
    draw = np.random.default_rng(seed)
    x = draw.choice([-1, 1], shape) * 2.0 ** draw.uniform(-octaves, 0, shape)
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("shape", "block"), [((3, 5, 40), 16), ((7,), 1), ((4, 600), 256)])
def test_every_number_keeps_its_relative_size(strict, shape, block, signed, key):
    x = spread(shape, 15 if signed else 31)
    x = x if signed else jnp.abs(x)
    numbers, scales = encode(x, block, signed=signed, key=key)
    got = decode(numbers, scales)
    assert (numbers.shape, numbers.dtype) == (shape, jnp.int8 if signed else jnp.uint8)
    assert scales.shape[-1] == -(-shape[-1] // block)
    bound = BOUND if key is None else 2 ** (1 / 8) - 1
    assert float(jnp.abs(got / x - 1).max()) < bound + 1e-5
    largest = jnp.abs(x).max()
    assert float(jnp.abs(got).max()) == float(largest)
    again = encode(got, block, signed=signed)
    np.testing.assert_array_equal(again[0], numbers)
    np.testing.assert_array_equal(again[1], scales)


def test_zero_is_zero_and_under_a_root_nothing_else_is(strict):
    x = jnp.array([[0.0, 1e-30, -1e-30, 1.0], [0.0] * 4])
    roots = decode(*encode(jnp.abs(x), signed=False))
    assert ((roots == 0) == (x == 0)).all()
    assert decode(*encode(x)).tolist() == [[0.0, 0.0, 0.0, 1.0], [0.0] * 4]
    assert jnp.isnan(decode(*encode(x.at[1, 1].set(jnp.nan)))).any()


def test_below_the_grid_signed_numbers_keep_their_mean():
    smallest = 2.0 ** (-126 / 8)
    x = jnp.array([1.0, 0.25 * smallest, -0.75 * smallest])
    keys = jax.random.split(jax.random.key(2), 4000)
    many = np.asarray(jax.vmap(lambda key: decode(*encode(x, key=key)))(keys)) / smallest
    assert set(np.unique(many[:, 1]).round(5)) == {0.0, 1.0}
    np.testing.assert_allclose(many[:, 1:].mean(0), [0.25, -0.75], atol=0.04)


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["nearest", "stochastic"])
def test_weights_without_a_gradient_come_to_rest(key):
    """Both moments at a floor would have a ratio of about one, and move them for ever."""
    tx = eight_bit(optax.scale_by_adam(b1=0.9, b2=0.95), smallest=1, key=key)
    draw = jax.random.normal(jax.random.key(1), (1, 256))
    half = jnp.arange(256) < 128

    @jax.jit
    def run(state, g, steps):
        def step(i, carried):
            noise = g * jax.random.normal(jax.random.key(i), (1, 256))
            return tx.update({"w": noise}, carried[1])

        return jax.lax.fori_loop(0, steps, step, ({"w": g}, state))

    _, state = run(tx.init({"w": draw}), jnp.ones((1, 256)), 50)
    updates, _ = run(state, jnp.where(half, 0.0, jnp.ones((1, 256))), 600)
    moved = jnp.abs(updates["w"])
    assert float(moved[:, :128].mean()) < 0.01 < 0.1 < float(moved[:, 128:].mean())


def test_scales_keep_the_type():
    got = decode(*encode(spread((3, 8), 4).astype(jnp.bfloat16)))
    assert got.dtype == jnp.bfloat16


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_rounding_has_no_bias(signed):
    x = jnp.abs(spread((32,), 10)).at[0].set(1.0)
    keys = jax.random.split(jax.random.key(1), 4000)
    many = jax.vmap(lambda key: decode(*encode(x, signed=signed, key=key)))(keys)
    error = np.asarray(many, np.float64).mean(0) - np.asarray(x)
    deviation = np.asarray(many).std(0) / np.sqrt(len(keys))
    assert (np.abs(error) <= 5 * deviation + 1e-6 * np.asarray(x)).all()
    assert (np.asarray(many).std(0)[1:] > 0).mean() > 0.9


def test_layers_are_blocked_by_themselves():
    x = spread((3, 8, 20), 12)
    numbers, scales = encode(x, 16)
    for layer in range(3):
        one = encode(x[layer], 16)
        np.testing.assert_array_equal(one[0], numbers[layer])
        np.testing.assert_array_equal(one[1], scales[layer])


MODEL = Transformer(gpt2_tiny(scan_layers=True))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 17)), jnp.int32)


def start():
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]


@jax.jit
def loss(params):
    picked = jax.nn.log_softmax(MODEL.apply({"params": params}, TOKENS[:, :-1]))
    return -jnp.take_along_axis(picked, TOKENS[:, 1:, None], -1).mean()


def train(tx, steps, params=None, state=None):
    params = start() if params is None else params
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for _ in range(steps):
        params, state, _ = step(params, state)
    return params, state


@functools.cache
def float_loss():
    return float(loss(train(optax.adamw(3e-3), 50)[0]))


@pytest.mark.variants(1)
@pytest.mark.parametrize("key", [None, jax.random.key(7)], ids=["nearest", "stochastic"])
def test_adamw_learns_as_with_float_state(key):
    first = float(loss(start()))
    params, state = train(eight_bit(optax.adamw(3e-3), smallest=256, key=key), 50)
    assert float_loss() < 0.7 * first  # else nearness would say nothing
    assert abs(float(loss(params)) - float_loss()) < 0.01 * first
    assert state.inner[0].mu["blocks"]["mlp"]["up"]["kernel"].dtype == jnp.int8
    assert state.inner[0].nu["blocks"]["mlp"]["up"]["kernel"].dtype == jnp.uint8


@pytest.mark.variants(1)
@pytest.mark.parametrize("key", [None, jax.random.key(7)], ids=["nearest", "stochastic"])
def test_it_resumes_bitwise(key):
    tx = eight_bit(optax.adamw(3e-3), smallest=256, key=key)
    whole = train(tx, 6)
    half = train(tx, 3)
    stored = jax.tree.map(
        lambda a: a if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else jnp.asarray(np.asarray(a)),
        half,
    )
    resumed = train(tx, 3, *stored)
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(
            *(
                jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a
                for a in (one, two)
            )
        )


def test_every_moment_draws_for_itself_and_anew():
    params = {name: spread((4, 64), 3) for name in ("a", "b")}
    tx = eight_bit(optax.sgd(0.1, momentum=0.9), smallest=1, key=jax.random.key(0))
    one = tx.update(params, tx.init(params), params)[1]
    two = tx.update(params, one._replace(inner=tx.init(params).inner), params)[1]
    first, second = (state.inner[0].trace for state in (one, two))
    assert (first["a"] != first["b"]).any()
    assert (first["a"] != second["a"]).any()


def test_bytes_and_small_leaves():
    params = {
        "blocks": {"up": {"kernel": jnp.ones((2, 256, 512)), "bias": jnp.ones((2, 512))}},
        "nu": {"kernel": jnp.ones((96, 100))},
    }
    plain, eight = (
        sum(a.nbytes for a in jax.tree.leaves(tx.init(params)))
        for tx in (optax.adam(1e-3), eight_bit(optax.adam(1e-3)))
    )
    assert eight < 0.27 * plain
    state = eight_bit(optax.adam(1e-3)).init(params)
    assert state.inner[0].mu["blocks"]["up"]["bias"].dtype == jnp.float32
    assert state.inner[0].count.dtype == jnp.int32
    # A parameter's own name says nothing about its moments.
    assert state.inner[0].mu["nu"]["kernel"].dtype == jnp.int8
    # Numbers have the shapes of moments, at their places, so that they are laid out like them.
    inner = optax.adam(1e-3).init(params)
    assert jax.tree.structure(inner) == jax.tree.structure(state.inner)
    assert jax.tree.map(jnp.shape, inner) == jax.tree.map(jnp.shape, state.inner)


@pytest.mark.variants(2)
@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.lion(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_rms(), optax.scale(-1e-3)),
        optax.masked(optax.adam(1e-3), {"a": True, "b": False}),
    ],
    ids=["sgd", "lion", "chain", "masked"],
)
def test_any_transformation_sees_decoded_moments(tx):
    """One step from zero moments is exact; the next sees moments off by the grid."""
    params = {"a": spread((4, 64), 3), "b": spread((4, 64), 3)}
    wrapped = eight_bit(tx, smallest=1)
    plain, state = tx.init(params), wrapped.init(params)
    assert state.scales
    for number in range(2):
        grads = jax.tree.map(lambda w, n=number: w * (n + 1), params)
        one, plain = tx.update(grads, plain, params)
        two, state = wrapped.update(grads, state, params)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6 if number == 0 else 0.05),
            one,
            two,
        )
    assert jax.tree.structure(state) == jax.tree.structure(wrapped.init(params))


def test_what_is_no_moment_stays_exact():
    """Averages of weights, weights of the start, covariances and bases of square kernels."""
    params = {"blocks": {"up": {"kernel": jnp.ones((1, 64, 64))}}}
    tail = optax.chain(optax.adam(1e-3), tail_average(0))
    soap = build(OPTIMIZERS["soap"](), Constant(), 10, params)
    for tx, exact in (
        (tail, {"average"}),
        (optax.contrib.prodigy(1.0), {"params0", "grad_sum"}),
        (soap, {"left", "right", "left_basis", "right_basis"}),
    ):
        state = eight_bit(tx, smallest=1).init(params)
        paths = dict(zip(leaf_paths(state.inner), jax.tree.leaves(state.inner), strict=True))
        names = {path: path.removesuffix("/blocks/up/kernel").split("/")[-1] for path in paths}
        kept = {names[path] for path, leaf in paths.items() if leaf.dtype == jnp.float32}
        assert exact <= kept
        coded = {names[path] for path, leaf in paths.items() if leaf.dtype in (jnp.int8, jnp.uint8)}
        assert coded & {"mu", "exp_avg"}
        assert not coded & exact


@pytest.mark.parametrize("b2", [0.98, 0.999])
def test_second_moments_forget_if_rounding_is_stochastic(b2):
    """One entry that stays holds the scale; the others' squares fall to a hundredth."""
    tx = eight_bit(optax.scale_by_adam(b2=b2), smallest=1, key=jax.random.key(0))
    steps = round(6 / (1 - b2))

    def run(state, g, steps):
        def step(state, _):
            return tx.update({"w": g}, state)[1], None

        return jax.lax.scan(step, state, None, steps)[0]

    after = jnp.full((1, 256), 0.1).at[0, 0].set(1.0)
    state = run(tx.init({"w": after}), jnp.ones((1, 256)), steps)
    state = jax.jit(run, static_argnums=2)(state, after, steps)
    nu = decode(state.inner.nu["w"], state.scales["nu/w"])
    wanted = 0.01 + math.exp(-6) * 0.99
    assert float(nu[0, 1:].mean()) == pytest.approx(wanted, rel=0.3)


def test_bad_input():
    with pytest.raises(ValueError, match="block of 0"):
        eight_bit(optax.adam(1e-3), block=0)
    with pytest.raises(ValueError, match="lower `smallest`"):
        eight_bit(optax.adam(1e-3)).init({"kernel": jnp.ones((4, 4))})
    with pytest.raises(ValueError, match="nothing would be kept"):
        eight_bit(optax.sgd(1e-3)).init({"kernel": jnp.ones((64, 64))})
