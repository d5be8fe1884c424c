"""Structured pruning: what added nothing goes without a trace, and the rest is a plain model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.pruning.structured import keep_groups, keep_layers, keep_neurons, keep_queries
from compress.pruning.structured_gates import gated, part_shape
from compress.pruning.structured_importance import (
    KEEP,
    best,
    by_activation,
    by_loss,
    by_magnitude,
    by_taylor,
    keep_best,
)
from compress.pruning.structured_width import centre_stream, keep_width
from model.cache import init_cache
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.transformer import Transformer, features

PRESETS = {
    "gpt2": gpt2_tiny(dropout=0.0, scan_layers=True),
    "llama": llama_tiny(scan_layers=True),
    "modern": modern_tiny(scan_layers=True, logit_softcap=None),
}
UNTIED = gpt2_tiny(dropout=0.0, scan_layers=True, tied_head=False)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 8)), jnp.int32)

every_preset = pytest.mark.parametrize("name", PRESETS)


def params_of(config, seed=1):
    """Every parameter at a visible scale, biases and norms too."""
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), TOKENS)["params"]
    draw = np.random.default_rng(seed)
    normal = lambda s: jnp.asarray(draw.normal(0, 0.3, s.shape), s.dtype)
    return jax.tree.map(normal, shapes)


MODELS = {name: (config, params_of(config)) for name, config in PRESETS.items()}
MODELS["untied"] = (UNTIED, params_of(UNTIED))


@functools.cache
def compiled(config):
    return jax.jit(Transformer(config).apply)


def logits(config, params):
    return np.asarray(compiled(config)({"params": params}, TOKENS))


def assert_same(one, other):
    """Within 1e-6 of the size of the logits."""
    np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max(), rtol=1e-5)


def fits(config, params):
    """The parameters are those of a model of this config."""
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)


def some(config, part, share, seed=2):
    """Random places to keep, other ones in every layer."""
    shape = part_shape(config, part)
    keep = int(shape[-1] * share)
    return best(np.random.default_rng(seed).random(shape), keep)


def gates_of(config, part, kept):
    gates = np.zeros(part_shape(config, part), np.float32)
    np.put_along_axis(gates, kept, 1.0, axis=-1)
    return jnp.asarray(gates)


@pytest.mark.variants(4)
@every_preset
@pytest.mark.parametrize("part", ["neurons", "groups", "layers"])
def test_what_added_nothing_goes_without_a_trace(strict, name, part):
    config, params = MODELS[name]
    kept = some(config, part, 0.5)
    silent = gated(config, params, part, gates_of(config, part, kept))
    small, fewer = KEEP[part](config, silent, kept)
    fits(small, fewer)
    assert_same(logits(small, fewer), logits(config, silent))
    # What went was not nothing before, and only the places that were named are right.
    assert np.abs(logits(config, params) - logits(config, silent)).max() > 0.01
    if part != "layers":
        assert (kept[0] != kept[1]).any()
        _, wrong = KEEP[part](config, silent, kept[::-1])
        assert np.abs(logits(small, wrong) - logits(config, silent)).max() > 0.01


def test_query_heads_of_groups(strict):
    config, params = MODELS["llama"]
    kept = np.array([[[1], [0]], [[0], [0]]])  # of 2 query heads in each of 2 groups, 2 layers
    o = params["blocks"]["attention"]["o"]["kernel"]
    gates = jnp.asarray([[0, 1, 1, 0], [1, 0, 1, 0]], jnp.float32).repeat(8, axis=1)
    silent = jax.tree.map(lambda w: w, params)
    silent["blocks"]["attention"]["o"]["kernel"] = o * gates[:, :, None]
    small, fewer = keep_queries(config, silent, kept)
    fits(small, fewer)
    assert (small.heads, small.kv_heads_, small.head_width_) == (2, 2, 8)
    assert_same(logits(small, fewer), logits(config, silent))


def centred_over(params, kept):
    """What is written to the stream sums to zero over the kept features and is zero elsewhere."""

    def write(w):
        rows = np.zeros(w.shape, np.float32)
        rows[..., kept] = np.asarray(w)[..., kept]
        rows[..., kept] -= rows[..., kept].mean(axis=-1, keepdims=True)
        return jnp.asarray(rows)

    params = jax.tree.map(lambda w: w, params)
    for path in (("attention", "o"), ("mlp", "down")):
        params["blocks"][path[0]][path[1]] = jax.tree.map(write, params["blocks"][path[0]][path[1]])
    for name in ("token_embedding", "position_embedding"):
        if name in params:
            params[name] = jax.tree.map(write, params[name])
    return params


@pytest.mark.variants(2)
@pytest.mark.parametrize("name", MODELS)
def test_features_that_are_zero_go_with_corrected_norms(strict, name):
    config, params = MODELS[name]
    # An epsilon that matters beside the variance of the stream.
    config = dataclasses.replace(config, norm_epsilon=0.05)
    kept = some(config, "width", 0.7)
    if config.norm == "layernorm":
        silent = centred_over(params, kept)
    else:
        silent = gated(config, params, "width", gates_of(config, "width", kept))
    if name == "untied":
        gone = np.setdiff1d(np.arange(32), kept)
        silent["head"] = {"kernel": silent["head"]["kernel"].at[gone].set(0)}
    small, fewer = keep_width(config, silent, kept)
    fits(small, fewer)
    expected = logits(config, silent)
    assert_same(logits(small, fewer), expected)
    # Each correction is needed.
    scale = {**fewer["final_norm"], "scale": params["final_norm"]["scale"][kept]}
    for wrong in (
        (dataclasses.replace(small, norm_epsilon=0.05), fewer),
        (small, {**fewer, "final_norm": scale}),
    ):
        assert np.abs(logits(*wrong) - expected).max() > 1e-3


def test_layer_norm_needs_a_stream_that_sums_to_zero():
    """The docstring says so; here is the difference where it does not."""
    config, params = MODELS["gpt2"]
    kept = some(config, "width", 0.7)
    silent = gated(config, params, "width", gates_of(config, "width", kept))
    small, fewer = keep_width(config, silent, kept)
    assert np.abs(logits(small, fewer) - logits(config, silent)).max() > 1e-3


def test_centring_the_stream_changes_nothing(strict):
    config, params = MODELS["untied"]
    centred = centre_stream(config, params)
    assert_same(logits(config, centred), logits(config, params))
    hidden = features(Transformer(config), centred, TOKENS, capture=("hidden",)).hidden
    np.testing.assert_allclose(hidden.sum(axis=-1), 0, atol=1e-5)
    for name in ("gpt2", "llama"):
        with pytest.raises(ValueError, match="untied head"):
            centre_stream(*MODELS[name])


@pytest.mark.slow
@every_preset
def test_smaller_in_every_way_it_still_trains_and_decodes(name):
    config, params = MODELS[name]
    for part, keep in (("layers", 1), ("width", 24), ("groups", 1), ("neurons", 40)):
        config, params = keep_best(config, params, part, by_magnitude(config, params, part), keep)
    fits(config, params)
    model = Transformer(config)

    @jax.jit
    def step(params):
        def loss(p):
            out = jax.nn.log_softmax(model.apply({"params": p}, TOKENS[:, :-1]))
            return -jnp.take_along_axis(out, TOKENS[:, 1:, None], axis=-1).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    first, params = step(params)
    for _ in range(5):
        last, params = step(params)
    assert last < first
    cached = features(model, params, TOKENS, cache=init_cache(config, 2, 8))
    np.testing.assert_allclose(cached.final, features(model, params, TOKENS).final, atol=1e-5)


def test_it_exports(tmp_path):
    """Fewer neurons and layers are a GPT-2 like any other."""
    huggingface = pytest.importorskip("model.huggingface")
    pytest.importorskip("safetensors")
    config, params = MODELS["gpt2"]
    config, params = keep_best(
        config, params, "neurons", by_magnitude(config, params, "neurons"), 40
    )
    config, params = keep_best(config, params, "layers", [2.0, 1.0], 1)
    huggingface.save(tmp_path / "small", config, params)
    read, again = huggingface.load(tmp_path / "small")
    assert (read.ffn_width, read.layers) == (40, 1)
    np.testing.assert_array_equal(logits(config, again), logits(config, params))


def test_windows_go_with_their_layers():
    config, params = MODELS["llama"]
    config = dataclasses.replace(config, window=(2, 5))
    silent = gated(config, params, "layers", jnp.array([0.0, 1.0]))
    small, fewer = keep_layers(config, silent, [1])
    assert_same(logits(small, fewer), logits(config, silent))


def loss_of(config):
    model = Transformer(config)

    def loss(params):
        out = jax.nn.log_softmax(model.apply({"params": params}, TOKENS[:, :-1]))
        return -jnp.take_along_axis(out, TOKENS[:, 1:, None], axis=-1).mean()

    return loss


@pytest.mark.variants(1)
@pytest.mark.parametrize("part", ["groups", "layers"])
def test_importance_by_loss_and_its_first_order(strict, part):
    config, params = MODELS["llama"]
    loss = loss_of(config)
    got = jax.jit(lambda p: by_loss(loss, config, p, part))(params)
    taylor = jax.jit(lambda p: by_taylor(loss, config, p, part))(params)
    for place in np.ndindex(got.shape):
        for gate, expected in ((0.0, got[place]), (0.99, taylor[place])):
            gates = jnp.ones(got.shape).at[place].set(gate)
            change = jax.jit(loss)(gated(config, params, part, gates)) - jax.jit(loss)(params)
            if gate:
                np.testing.assert_allclose(abs(change) / 0.01, expected, rtol=0.1, atol=5e-4)
            else:
                np.testing.assert_allclose(change, expected, atol=1e-5)


@every_preset
def test_importance_by_magnitude_counts_what_goes(name):
    """The squares of what goes and of what stays add up to those of all."""
    config, params = MODELS[name]
    squares = lambda tree: sum(float(jnp.square(w).sum()) for w in jax.tree.leaves(tree))
    for part, change in (("neurons", keep_neurons), ("groups", keep_groups)):
        kept = some(config, part, 0.5)
        importance = np.asarray(by_magnitude(config, params, part)) ** 2
        stays = np.take_along_axis(importance, kept, axis=-1).sum()
        _, fewer = change(config, params, kept)
        gone = squares(params) - squares(fewer)
        np.testing.assert_allclose(gone, importance.sum() - stays, rtol=1e-4)
    kernels = by_magnitude(config, params, "layers") ** 2
    only = {
        k: {n: w["kernel"] for n, w in v.items() if "kernel" in w}
        for k, v in params["blocks"].items()
        if k in ("attention", "mlp")
    }
    np.testing.assert_allclose(kernels.sum(), squares(only), rtol=1e-4)
    width = by_magnitude(config, params, "width")
    silent = gated(config, params, "width", jnp.ones(32).at[3].set(0))
    assert (by_magnitude(config, silent, "width") < width).tolist() == [i == 3 for i in range(32)]


@pytest.mark.slow
def test_importance_by_activation(strict):
    config, params = MODELS["gpt2"]
    model = Transformer(config)
    batches = [TOKENS, TOKENS[::-1, ::-1]]
    for part in ("neurons", "groups", "width", "layers"):
        got = by_activation(model, params, batches, part)
        assert got.shape == part_shape(config, part)
        assert (got > 0).all()
    # a neuron that is always off
    off = jax.tree.map(lambda w: w, params)
    off["blocks"]["mlp"]["up"]["bias"] = off["blocks"]["mlp"]["up"]["bias"].at[1, 7].set(-50)
    strength = by_activation(model, off, batches, "neurons")
    assert np.unravel_index(strength.argmin(), strength.shape) == (1, 7)
    # a layer that does nothing
    idle = gated(config, params, "layers", jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(by_activation(model, idle, batches, "layers")[1], 0, atol=1e-6)
    # features: of the stream itself
    hidden = [features(model, params, t, capture=("hidden",)).hidden[:-1] for t in batches]
    expected = np.sqrt(np.square(np.stack(hidden)).mean(axis=(0, 1, 2, 3)))
    np.testing.assert_allclose(by_activation(model, params, batches, "width"), expected, rtol=1e-4)


def test_bad_input_is_explained():
    config, params = MODELS["llama"]
    with pytest.raises(ValueError, match=r"neurons to keep need the shape \[2, 'how many'\]"):
        keep_neurons(config, params, [1, 2])
    with pytest.raises(ValueError, match="there are 96 neurons, from 0 to 95"):
        keep_neurons(config, params, [[1], [96]])
    with pytest.raises(ValueError, match="twice"):
        keep_groups(config, params, [[0, 0], [0, 1]])
    with pytest.raises(ValueError, match="are indices, not"):
        keep_width(config, params, [0.5])
    unscaled = modern_tiny(norm_scale=False)
    with pytest.raises(ValueError, match="corrected in the scales of the norms"):
        keep_width(unscaled, params_of(unscaled), range(16))
    with pytest.raises(ValueError, match="keep their order"):
        keep_layers(config, params, [1, 0])
    with pytest.raises(ValueError, match="no part is called 'experts'"):
        by_magnitude(config, params, "experts")
    with pytest.raises(ValueError, match="cannot keep 3 of 2"):
        keep_best(config, params, "layers", np.ones(2), 3)
    with pytest.raises(ValueError, match=r"importance of 'layers' has the shape \(2,\)"):
        keep_best(config, params, "layers", np.ones(3), 1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        best([1.0, np.nan], 1)
    with pytest.raises(ValueError, match="no batch of tokens"):
        by_activation(Transformer(config), params, [], "width")
