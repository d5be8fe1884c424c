"""Scales folded into a block: SmoothQuant and AWQ keep the function and serve their purpose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.calibrate import sequential
from compress.quantization.awq import awq_params, best_scales
from compress.quantization.folding import at_least, fold, sites_of
from compress.quantization.formats import FORMATS
from compress.quantization.quantize import is_qtensor, quantize_params, report
from compress.quantization.rounding import quantize
from compress.quantization.smoothquant import smooth_params
from compress.quantization.w8a8 import Activation, integer_products
from model.flops import abstract_params
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("strict")
CONFIGS = {"gpt2": gpt2_tiny, "llama": llama_tiny}
TOKENS = jax.random.randint(jax.random.key(2), (8, 16), 0, 64)


@functools.cache
def setting(preset):
    """A model with an outlier: one channel of the stream is many times larger after its norm."""
    config = CONFIGS[preset](scan_layers=True)

    @jax.jit
    def draw():
        leaves, structure = jax.tree.flatten(abstract_params(config))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        drawn = [0.3 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
        params = jax.tree.unflatten(structure, drawn)
        for name in ("attention_norm", "mlp_norm"):
            scale = params["blocks"][name]["scale"]
            params["blocks"][name]["scale"] = (1 + 0.2 * scale).at[:, 5].set(40.0)
        for path in (("attention", "q"), ("attention", "k"), ("attention", "v"), ("mlp", "up")):
            kernel = params["blocks"][path[0]][path[1]]
            kernel["kernel"] = kernel["kernel"].at[:, 5].multiply(0.05)
        return params

    return Transformer(config), draw()


def logits(model, params):
    return jax.jit(lambda p: model.apply({"params": p}, TOKENS))(params)


def error(model, params, other):
    return float(jnp.square(logits(model, params) - logits(model, other)).mean())


def test_norms_without_scales_are_refused():
    with pytest.raises(ValueError, match="norm_scale is False"):
        sites_of(modern_tiny(norm_scale=False))


@pytest.mark.parametrize("preset", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_folding_changes_no_function(preset):
    model, params = setting(preset)
    for site in sites_of(model.config):
        blocks = params["blocks"]
        part, name, leaf = site.kernels[0].split("/")
        inputs = blocks[part][name][leaf].shape[1]
        scales = jnp.exp(jax.random.normal(jax.random.key(0), (model.config.layers, inputs)))
        folded = jax.vmap(lambda layer, s, site=site: fold(layer, site, s))(blocks, scales)
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), blocks, folded)
        assert sum(jax.tree.leaves(changed)) >= len(site.kernels) + 1
        expected = logits(model, params)
        got = logits(model, {**params, "blocks": folded})
        np.testing.assert_allclose(got, expected, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.slow
def test_smoothing_keeps_the_function_and_helps_integer_products():
    model, params = setting("gpt2")
    smooth = smooth_params(model, params, [TOKENS])
    expected = logits(model, params)
    tolerance = 2e-5 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(logits(model, smooth), expected, atol=tolerance)

    def integers(params):
        q = quantize_params(params, [("kernel", "int8")])
        return integer_products(q, Activation(share="tensor"))

    assert error(model, params, integers(smooth)) < 0.5 * error(model, params, integers(params))


def test_smooth_ranges_are_what_the_formula_says():
    model, params = setting("gpt2")
    smooth = smooth_params(model, params, [TOKENS], alpha=1.0)
    seen = []
    sequential(model, smooth, [TOKENS], ("absmax",), lambda n, layer, s: (seen.append(s), layer)[1])
    # alpha = 1 divides every input by its largest magnitude.
    for path in ("attention/q/kernel", "mlp/up/kernel", "attention/o/kernel"):
        np.testing.assert_allclose(seen[1][path]["absmax"], 1.0, rtol=1e-3)


def test_best_scales_never_lose_to_rounding():
    x = jax.random.normal(jax.random.key(0), (200, 64)).at[:, ::16].multiply(20.0)
    w = jax.random.normal(jax.random.key(1), (64, 8))
    H, mean = x.T @ x, jnp.abs(x).mean(axis=0)
    for name in ("int3", "q4_0", "q4_1"):
        scales, errors = best_scales((w, w * 2), H, mean, (FORMATS[name],) * 2, 10, 1)
        plain, scaled = (
            float(jnp.square(x @ w - x @ (quantize(w * s, name).dequantize() / s)).sum())
            for s in (jnp.ones((64, 1)), scales[:, None])
        )
        assert scaled < 0.8 * plain
        # Twice the kernel has four times the error.
        np.testing.assert_allclose(errors[0], 5 * plain, rtol=1e-2)
        assert float(errors.min()) < float(errors[0])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_awq_is_nearer_than_rounding(preset):
    model, params = setting(preset)
    rules = [("token_embedding", "int8"), ("kernel", "int3")]
    q, nearest = awq_params(model, params, [TOKENS], rules, steps=8), quantize_params(params, rules)
    assert jax.tree.structure(q) == jax.tree.structure(nearest)
    assert report(q).bytes == report(nearest).bytes
    assert error(model, params, q) < 0.8 * error(model, params, nearest)


def test_awq_leaves_what_the_rules_leave():
    model, params = setting("gpt2")
    q = awq_params(model, params, [TOKENS], [("mlp/up/kernel", "int3")], steps=2)
    found = [row.path for row in report(q).rows if row.format is not None]
    assert found == ["blocks/mlp/up/kernel"]
    same = q["blocks"]["attention"]["q"]["kernel"] == params["blocks"]["attention"]["q"]["kernel"]
    assert bool(same.all())
    assert not is_qtensor(q["token_embedding"]["embedding"])


def test_bad_input():
    model, params = setting("gpt2")
    q = quantize_params(params, [("kernel", "int8")])
    cases = [
        (lambda: smooth_params(model, params, [TOKENS], alpha=1.5), "alpha is 1.5"),
        (lambda: smooth_params(model, q, [TOKENS]), "are quantized; smooth the plain ones"),
        (lambda: awq_params(model, params, [TOKENS], [("kernel", "int3")], steps=0), "too few"),
        (lambda: awq_params(model, params, [], [("kernel", "int3")]), "no batch"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    np.testing.assert_array_equal(at_least(jnp.zeros(3)), jnp.ones(3))
