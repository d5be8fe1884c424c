"""Factors by rules, in models that run, scan and train with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.lowrank import LowRank, Sum
from compress.lowrank_params import (
    compensate_on,
    compensate_params,
    factorize_on,
    factorize_params,
    is_weight,
    rank_for,
    ranks_by_path,
)
from compress.quantization.quantize import quantize_params
from model.presets import gpt2_tiny
from model.transformer import Transformer

MODEL = Transformer(gpt2_tiny(scan_layers=True))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 24)), jnp.int32)
KERNELS = "blocks/.*/kernel"


def params_of():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(draw.normal(0, 0.3, s.shape), s.dtype), shapes)


PARAMS = params_of()


def logits(params, model=MODEL):
    return jax.jit(lambda p: model.apply({"params": p}, TOKENS))(params)


def distance(params):
    """Mean KL of the predictions from those of the plain model."""
    one, two = jax.nn.log_softmax(logits(PARAMS)), jax.nn.log_softmax(logits(params))
    return float((jnp.exp(one) * (one - two)).sum(-1).mean())


def full(params):
    return jax.tree.map(lambda w: w.full() if is_weight(w) else w, params, is_leaf=is_weight)


@pytest.mark.slow
def test_models_run_scanned_and_unrolled():
    low = factorize_params(PARAMS, [(KERNELS, 8), ("token_embedding", 16)])
    assert isinstance(low["token_embedding"]["embedding"], LowRank)
    assert isinstance(low["blocks"]["mlp"]["up"]["kernel"], LowRank)
    expected = logits(full(low))
    np.testing.assert_allclose(logits(low), expected, atol=2e-3)
    loop = Transformer(gpt2_tiny(scan_layers=False))
    np.testing.assert_allclose(logits(low, loop), expected, atol=2e-3)
    whole = factorize_params(PARAMS, [(KERNELS, 32)])
    np.testing.assert_allclose(logits(whole), logits(PARAMS), atol=5e-3)


def test_calibration_helps():
    blind = factorize_params(PARAMS, [("mlp/up/kernel", 12)])
    seen = factorize_on(MODEL, PARAMS, [TOKENS[:4], TOKENS[4:]], [("mlp/up/kernel", 12)])
    assert jax.tree.structure(blind) == jax.tree.structure(seen)
    assert distance(seen) < distance(blind)


def test_compensation_helps():
    quantized = quantize_params(PARAMS, [(KERNELS, "int3")])
    blind = compensate_params(PARAMS, quantized, [(KERNELS, 6)])
    seen = compensate_on(MODEL, PARAMS, quantized, [TOKENS], [(KERNELS, 6)])
    assert isinstance(seen["blocks"]["mlp"]["up"]["kernel"], Sum)
    assert jax.tree.structure(blind) == jax.tree.structure(seen)
    assert distance(seen) < distance(quantized)
    assert distance(blind) < distance(quantized)
    np.testing.assert_allclose(logits(seen), logits(full(seen)), atol=2e-3)


def test_factors_train():
    low = factorize_params(PARAMS, [(KERNELS, 8)])

    def loss(params):
        picked = jax.nn.log_softmax(MODEL.apply({"params": params}, TOKENS[:, :-1]))
        return -jnp.take_along_axis(picked, TOKENS[:, 1:, None], -1).mean()

    step = jax.jit(lambda p: jax.tree.map(lambda w, g: w - 0.02 * g, p, jax.grad(loss)(p)))
    first = loss(low)
    for _ in range(5):
        low = step(low)
    assert loss(low) < first
    assert isinstance(low["blocks"]["mlp"]["up"]["kernel"], LowRank)


def test_rank_for():
    for shape, share in [((64, 10), 0.5), ((3, 768, 3072), 0.25), ((4, 4), 0.01)]:
        r, (i, o) = rank_for(shape, share), shape[-2:]
        assert r == 1 or r * (i + o) <= share * i * o < (r + 1) * (i + o)


def test_bad_input():
    low = factorize_params(PARAMS, [(KERNELS, 8)])
    cases = [
        (lambda: ranks_by_path(PARAMS, [("kernels", 8)]), "'kernels'"),
        (lambda: ranks_by_path(PARAMS, [("kernel", 0)]), "no weight any factors"),
        (lambda: ranks_by_path(PARAMS, [("kernel", 33)]), "ranks from 1 to 32, not 33"),
        (lambda: ranks_by_path(PARAMS, [("blocks/.*/bias", 1)]), "no matrix"),
        (lambda: ranks_by_path(low, [("mlp/up/kernel", 2)]), "or has them already"),
        (lambda: ranks_by_path(PARAMS, [("blocks/0/mlp/up/kernel", 2)]), "all layers of a leaf"),
        (lambda: compensate_params(low, PARAMS, [(KERNELS, 2)]), "no plain array"),
        (
            lambda: factorize_on(MODEL, PARAMS, [TOKENS], [("token_embedding", 2)]),
            "no kernel of a block",
        ),
        (lambda: factorize_on(MODEL, PARAMS, [], [(KERNELS, 2)]), "no batch of tokens"),
        (lambda: rank_for((4, 4), 0.0), r"in \(0, 1\]"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"'blocks/mlp/up/kernel': a weight .* holds NaN"):
        factorize_params(jax.tree.map(lambda w: w * jnp.nan, PARAMS), [("mlp/up/kernel", 2)])
