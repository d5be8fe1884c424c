"""Low-rank adaptation: one weight kept apart or merged, its gradient, its start, its bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.lora import (
    SCALINGS,
    Dora,
    adapted_paths,
    attach,
    detach,
    init_adapters,
    merged,
)
from compress.lowrank import LowRank, Sum
from compress.lowrank_params import ranks_by_path
from compress.quantization.quantize import quantize_params, weight_rules
from model.flops import abstract_params
from model.linear import linear, take
from model.presets import gpt2_tiny
from model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("strict")

KEYS = jax.random.split(jax.random.key(0), 5)
W = jax.random.normal(KEYS[0], (32, 6))
A, B = jax.random.normal(KEYS[1], (32, 3)), jax.random.normal(KEYS[2], (3, 6))
X = jax.random.normal(KEYS[3], (2, 5, 32))


def dora_by_hand(w, a, b, m, axis):
    """The paper's equation 5, by NumPy in float64."""
    v = np.asarray(w, np.float64) + np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    return np.expand_dims(np.asarray(m), axis) * v / np.linalg.norm(v, axis=axis, keepdims=True)


@pytest.mark.variants(1)
@pytest.mark.parametrize("axis", [-2, -1])
def test_dora_is_the_papers_formula(axis):
    m = 1 + jax.random.uniform(KEYS[4], (6 if axis == -2 else 32,))
    w = Dora(Sum(W, LowRank(A, B)), m, axis)
    expected = dora_by_hand(W, A, B, m, axis)
    np.testing.assert_allclose(w.full(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(linear(X, w), X @ expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(w.T.full(), expected.T, rtol=1e-4, atol=1e-5)
    ids = jnp.array([[3, 0], [31, 3]])
    np.testing.assert_allclose(take(w, ids, jnp.float32), expected[ids], rtol=1e-4, atol=1e-5)
    assert np.isnan(take(w, jnp.array([32]), jnp.float32)).all()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
    assert stacked.shape == (2, 32, 6)
    np.testing.assert_allclose(stacked.full()[1], expected, rtol=1e-4, atol=1e-5)
    x = X[:, 0][:, None]
    np.testing.assert_allclose(x @ stacked, x @ expected, rtol=1e-3, atol=1e-4)


def test_doras_gradient_holds_the_length_constant():
    m = jnp.ones(6)

    def loss(b, length):
        v = W + A @ b
        length = jnp.linalg.norm(W + A @ length, axis=0)
        return jnp.square(X @ (v * (m / length)[None])).sum()

    ours = jax.grad(lambda b: jnp.square(X @ Dora(Sum(W, LowRank(A, b)), m)).sum())(B)
    np.testing.assert_allclose(ours, jax.grad(loss)(B, B), rtol=1e-3, atol=1e-3)
    through = jax.grad(lambda b: loss(b, b))(B)
    assert np.abs(ours - through).max() > 0.1  # the test can tell them apart


def drawn(tree, key=7):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    new = [0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


def beside(params, adapters):
    if not isinstance(params, dict):
        return params
    more = {k: beside(v, adapters.get(k, {})) for k, v in params.items()}
    return more | ({"lora": adapters["lora"]} if "lora" in adapters else {})


RULES = [("attention/(q|v)/kernel", 4), ("mlp/down/kernel", 2), ("token_embedding", 3)]
SCALE = functools.partial(SCALINGS["rslora"], 4.0)


@pytest.fixture(scope="module")
def model_and_params():
    config = gpt2_tiny(scan_layers=True)
    return Transformer(config), drawn(abstract_params(config))


@pytest.mark.parametrize("direction", ["lora", "dora"])
@pytest.mark.parametrize("base", [None, "q4_0"])
def test_a_model_runs_alike_with_factors_apart_and_merged(model_and_params, base, direction):
    model, params = model_and_params
    if base is not None:
        params = quantize_params(params, weight_rules(params, base))
    tokens = jnp.arange(12).reshape(2, 6)
    run = jax.jit(lambda params: model.apply({"params": params}, tokens))
    adapters = init_adapters(jax.random.key(1), params, ranks_by_path(params, RULES), direction)
    at_first = run(attach(beside(params, adapters), SCALE))
    np.testing.assert_allclose(at_first, run(params), rtol=1e-5, atol=1e-5)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    whole = beside(params, moved)
    apart = attach(whole, SCALE)
    assert adapted_paths(apart) == [
        "blocks/attention/q/kernel",
        "blocks/attention/v/kernel",
        "blocks/mlp/down/kernel",
        "token_embedding/embedding",
    ]
    plain = merged(apart)
    assert not adapted_paths(plain)
    logits = run(apart)
    np.testing.assert_allclose(logits, run(plain), rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(logits, run(attach(whole, SCALE, "merged")), rtol=2e-4, atol=2e-4)
    assert np.abs(logits - at_first).max() > 0.1
    assert jax.tree.structure(detach(whole)) == jax.tree.structure(adapters)


def test_scales():
    tree = {"up": {"kernel": W, "lora": {"kernel": {"a": A, "b": B}}}}
    for name, s in (("lora", 6 / 3), ("rslora", 6 / 3**0.5)):
        w = attach(tree, functools.partial(SCALINGS[name], 6.0))["up"]["kernel"]
        np.testing.assert_allclose(w.full(), W + s * A @ B, rtol=1e-4, atol=1e-4)


def test_factors_do_not_depend_on_what_else_has_some():
    params = {name: {"kernel": W} for name in ("up", "down")}
    both = init_adapters(jax.random.key(0), params, {"up/kernel": 2, "down/kernel": 2})
    one = init_adapters(jax.random.key(0), params, {"up/kernel": 2})
    a = both["up"]["lora"]["kernel"]["a"]
    assert (a == one["up"]["lora"]["kernel"]["a"]).all()
    assert not (a == both["down"]["lora"]["kernel"]["a"]).all()
    assert float(a.std()) == pytest.approx(32**-0.5, rel=0.2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: attach({}, SCALE, "glued"), "'apart' or 'merged'"),
        (lambda: attach({"up": {"lora": {"kernel": {}}}}, SCALE), "factors for 'kernel'"),
        (lambda: init_adapters(jax.random.key(0), {}, {}, "both"), "'lora' or 'dora'"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
