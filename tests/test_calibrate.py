"""Calibration: the inputs that kernels really have, layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress import calibrate
from compress.calibrate import observe, sequential, windows
from compress.lowrank_params import compensate_on, factorize_on
from compress.observed import embed, look_at_layer, observe_layer, statistics_of
from compress.pruning.sparsegpt import sparsegpt_params
from compress.pruning.structured_importance import by_activation
from compress.pruning.wanda import wanda
from compress.quantization import awq
from compress.quantization.awq import awq_params
from compress.quantization.gptq import gptq_params
from compress.quantization.quantize import quantize_params
from compress.quantization.smoothquant import smooth_params
from compress.quantization.w8a8 import activation_ranges
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


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_what_is_observed_in_one_pass_is_what_two_passes_find(name):
    model, params = MODELS[name], params_of(name)
    seen = []
    names = ("hessian", "low", "tokens")
    out = sequential(model, params, BATCHES, names, lambda n, la, s: (seen.append(s), la)[1])
    found = observe(model, params, BATCHES, names)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    jax.tree.map(same, found.layers, seen)
    jax.tree.map(same, found.head, out.head)
    some = ("attention/o/kernel", "mlp/up/kernel")
    fewer = observe(model, params, BATCHES, names, kernels=some)
    assert all(sorted(layer) == sorted(some) for layer in fewer.layers)
    jax.tree.map(same, fewer.layers, [{path: s[path] for path in some} for s in seen])
    other = []
    sequential(
        model, params, BATCHES, names, lambda n, la, s: (other.append(s), la)[1], kernels=some
    )
    jax.tree.map(same, other, fewer.layers)


def test_what_nobody_asks_for_is_not_computed():
    model, params = MODELS["gpt2"], params_of("gpt2")
    layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    x_BTD = jnp.ones((2, 12, 32))

    def products(look, kernels):
        call = jax.jit(lambda layer, x: look(model, layer, x, None, ("hessian",), kernels))
        return call.lower(layer, x_BTD).compile().as_text().count(" dot(")

    paths = tuple(f"attention/{name}/kernel" for name in "qkvo")
    every = (*paths, "mlp/up/kernel", "mlp/down/kernel")
    # Only the stream needs what `down` gives.
    assert products(look_at_layer, every) == products(observe_layer, every) - 1
    assert products(look_at_layer, paths[:1]) == 1


def test_who_replaces_nothing_takes_one_pass(monkeypatch):
    model, params = MODELS["gpt2"], params_of("gpt2")
    for name in ("_run", "_look"):
        monkeypatch.setattr(calibrate, name, _never)
    assert by_activation(model, params, BATCHES, "neurons").shape == (2, 128)
    assert len(activation_ranges(model, params, BATCHES)) == 7


def test_awq_asks_for_no_hessian_that_it_does_not_use(monkeypatch):
    asked = []

    def fake(model, params, batches, names, one, *, kernels):
        asked.append(list(kernels))
        raise KeyboardInterrupt

    monkeypatch.setattr(awq, "sequential", fake)
    wanted = {"gpt2": ["q", "up", "o"], "llama": ["q", "up", "down"]}
    for name, kernels in wanted.items():
        with pytest.raises(KeyboardInterrupt):
            awq_params(MODELS[name], params_of(name), BATCHES, [("kernel", "q4_0")])
        assert [path.split("/")[1] for path in asked[-1]] == kernels


BLOCKS = "blocks/.*/kernel"
CALIBRATED = {
    "wanda": lambda model, params: wanda(model, params, BATCHES, 0.5),
    "smoothquant": lambda model, params: smooth_params(model, params, BATCHES),
    "gptq": lambda model, params: gptq_params(model, params, BATCHES, [(BLOCKS, "q4_0")]),
    "awq": lambda model, params: awq_params(model, params, BATCHES, [(BLOCKS, "q4_0")]),
    "sparsegpt": lambda model, params: sparsegpt_params(model, params, BATCHES, [(BLOCKS, 0.5)]),
    "factorized": lambda model, params: factorize_on(model, params, BATCHES, [(BLOCKS, 2)]),
    "compensated": lambda model, params: compensate_on(
        model, params, params_of("gpt2"), BATCHES, [(BLOCKS, 2)]
    ),
    "importance": lambda model, params: by_activation(model, params, BATCHES, "groups"),
    "ranges": lambda model, params: activation_ranges(model, params, BATCHES),
}


@pytest.mark.parametrize("method", CALIBRATED)
def test_weights_that_are_not_finite_are_named_before_anything_runs(method, monkeypatch):
    params = params_of("gpt2")
    up = params["blocks"]["mlp"]["up"]
    up = {**up, "kernel": up["kernel"].at[1, 0, 0].set(jnp.nan)}  # of the second layer
    mlp = {**params["blocks"]["mlp"], "up": up}
    broken = {**params, "blocks": {**params["blocks"], "mlp": mlp}}
    for name in ("_embed", "_run", "_look", "_observe"):
        monkeypatch.setattr(calibrate, name, _never)
    with pytest.raises(ValueError, match=r"blocks/mlp/up/kernel'? holds NaN or infinity"):
        CALIBRATED[method](MODELS["gpt2"], broken)


@pytest.mark.parametrize("method", ["wanda", "ranges"])
def test_tokens_outside_of_the_vocabulary_are_refused(method, monkeypatch):
    monkeypatch.setattr(calibrate, "_embed", _never)
    for ids, said in (([[1, 64]], "1 to 64"), ([[-1, 3]], "-1 to 3")):
        monkeypatch.setitem(globals(), "BATCHES", [np.array(ids)])
        with pytest.raises(ValueError, match=f"token ids {said}, but the vocabulary has 0 to 63"):
            CALIBRATED[method](MODELS["gpt2"], params_of("gpt2"))


def _never(*args):
    raise AssertionError("this is too late")


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
        (
            lambda: sequential(model, params, BATCHES, ("low",), keep, kernels=["mlp/x"]),
            "no kernel .*mlp/x",
        ),
        (lambda: observe(model, params, BATCHES, ("low",), kernels=["mlp/x"]), "no kernel .*mlp/x"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
