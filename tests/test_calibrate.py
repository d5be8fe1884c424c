"""Calibration: the inputs that kernels really have, layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.calibrate import embed, sequential, statistics_of, windows
from compress.quantize import quantize_params
from model.flops import abstract_params
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.transformer import Transformer, features

NAMES = ("hessian", "absmax", "square_sum", "abs_sum", "low", "high", "tokens")
BATCHES = windows(np.random.default_rng(0).integers(0, 64, 100), length=12, batch=3)
MODELS = {
    "gpt2": Transformer(gpt2_tiny()),
    "llama": Transformer(llama_tiny(window=(3, 20))),
    "modern": Transformer(modern_tiny(scan_layers=True)),
}


@functools.cache
def params_of(name):
    @jax.jit
    def draw():
        leaves, structure = jax.tree.flatten(abstract_params(MODELS[name].config))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        drawn = [0.3 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    return draw()


def keep(number, layer, seen):
    return layer


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "modern"))]
)
def test_untouched_layers_give_the_models_own_features(strict, name):
    model, params = MODELS[name], params_of(name)
    seen = []
    out = sequential(model, params, BATCHES, NAMES, lambda n, layer, s: (seen.append(s), layer)[1])
    run = jax.jit(lambda p, t: features(model, p, t, capture=("hidden",)))
    runs = [run(params, jnp.asarray(tokens)) for tokens in BATCHES]
    final = jnp.concatenate([r.final.reshape(-1, 32) for r in runs])
    for statistic, expected in statistics_of(final, NAMES).items():
        np.testing.assert_allclose(out.head[statistic], expected, rtol=2e-4, atol=2e-3)
    jax.tree.map(np.testing.assert_array_equal, out.params, params)

    # The inputs of q, k, v are the normalised stream.
    assert len(seen) == model.config.layers
    for number, by_path in enumerate(seen):
        stream = np.concatenate([np.asarray(r.hidden[number]).reshape(-1, 32) for r in runs])
        scale = np.asarray(params["blocks"]["attention_norm"]["scale"][number])
        mean = stream.mean(-1, keepdims=True) if name == "gpt2" else 0.0
        x = stream - mean
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_epsilon) * scale
        if name == "gpt2":
            x = x + np.asarray(params["blocks"]["attention_norm"]["bias"][number])
        got = by_path["attention/q/kernel"]
        np.testing.assert_allclose(got["hessian"], x.T @ x, rtol=1e-3, atol=1e-2)
        np.testing.assert_allclose(got["absmax"], abs(x).max(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(got["square_sum"], (x**2).sum(0), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(got["abs_sum"], abs(x).sum(0), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(got["low"], x.min(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(got["high"], x.max(0), rtol=1e-3, atol=1e-4)
        assert float(got["tokens"]) == 96
        np.testing.assert_array_equal(by_path["attention/v/kernel"]["hessian"], got["hessian"])


def test_every_kernel_of_the_block_is_seen():
    seen = []
    for name, count in (("gpt2", 6), ("llama", 7)):
        sequential(
            MODELS[name],
            params_of(name),
            BATCHES[:1],
            ("square_sum",),
            lambda n, layer, s: (seen.append(s), layer)[1],
        )
        widths = {path: s["square_sum"].shape[0] for path, s in seen[-1].items()}
        assert len(widths) == count
        assert widths["mlp/down/kernel"] == MODELS[name].config.ffn_width_


def test_the_next_layer_sees_what_the_replaced_one_gives():
    model, params = MODELS["gpt2"], params_of("gpt2")
    seen = []

    def mute(number, layer, by_path):
        seen.append(by_path)
        return jax.tree.map(jnp.zeros_like, layer)

    out = sequential(model, params, BATCHES, ("absmax",), mute)
    assert not any(leaf.any() for leaf in jax.tree.leaves(out.params["blocks"]))
    # A muted block adds nothing, so layer 1 is given the embedding, as layer 0 was.
    x = np.concatenate([embed(model, params, jnp.asarray(t)).reshape(-1, 32) for t in BATCHES])
    norm = jax.tree.map(lambda leaf: np.asarray(leaf[1]), params["blocks"]["attention_norm"])
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(
        seen[1]["attention/q/kernel"]["absmax"], abs(x).max(0), rtol=1e-3, atol=1e-4
    )


def test_stages_see_what_earlier_stages_changed():
    model, params = MODELS["gpt2"], params_of("gpt2")
    stages = [["attention/v/kernel"], ["attention/o/kernel"]]
    seen = []

    def mute_v(number, layer, by_path):
        seen.append(by_path)
        if "attention/v/kernel" in by_path:
            v = jax.tree.map(jnp.zeros_like, layer["attention"]["v"])
            layer = {**layer, "attention": {**layer["attention"], "v": v}}
        return layer

    sequential(model, params, BATCHES, ("absmax",), mute_v, stages=stages)
    assert [sorted(s) for s in seen] == [*stages, *stages]
    assert seen[0]["attention/v/kernel"]["absmax"].any()
    assert not seen[1]["attention/o/kernel"]["absmax"].any()


@pytest.mark.slow
def test_quantized_models_are_observed_too():
    model = MODELS["llama"]
    q = quantize_params(params_of("llama"), [("kernel", "q8_0")])
    out = sequential(model, q, BATCHES, ("square_sum",), keep)
    assert jax.tree.structure(out.params) == jax.tree.structure(q)
    plain = sequential(model, params_of("llama"), BATCHES, ("square_sum",), keep)
    np.testing.assert_allclose(out.head["square_sum"], plain.head["square_sum"], rtol=0.1)


def test_bad_input():
    model, params = MODELS["gpt2"], params_of("gpt2")
    cases = [
        (lambda: windows([1, 2, 3], length=4, batch=1), "windows of 4 tokens, but there are 3"),
        (lambda: windows([1, 2, 3], length=2, batch=0), "at least 1"),
        (lambda: sequential(model, params, [], ("absmax",), keep), "no batch of tokens"),
        (lambda: sequential(model, params, BATCHES, ("median",), keep), "'median'.*there are"),
        (lambda: sequential(model, params, [np.zeros(4, int)], ("low",), keep), "token ids"),
        (
            lambda: sequential(model, params, BATCHES, ("low",), keep, stages=[["mlp/x"]]),
            "no kernel .*mlp/x",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
