"""Embedding shortcuts, value embeddings, blocks and tokens that are left out at random."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.cache import init_cache
from model.drop import kept_tokens, survival
from model.flops import (
    abstract_params,
    flops_per_token,
    parameter_count,
    training_flops_per_token,
)
from model.huggingface_config import write_config
from model.presets import llama_tiny, modern_tiny
from model.transformer import Transformer, features, head
from parallel.mesh import make_mesh
from parallel.pipeline import pipeline
from train.optimizers import Muon, build
from train.schedules import Constant

SHORTCUTS = {"embedding_norm": True, "embedding_shortcut": 0.1, "value_embeddings": True}
TOKENS = jax.random.randint(jax.random.key(1), (4, 8), 0, 64)


def drawn(config, scale=0.3):
    leaves, structure = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    new = [scale * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


def logits_of(config, params, tokens=TOKENS, **parts):
    model = Transformer(config, **parts)
    return jax.jit(lambda p, t: model.apply({"params": p}, t))(params, tokens)


def test_the_equations(strict):
    """One block against the formulas written out, in NumPy, without attention to others."""
    config = llama_tiny(layers=1, window=1, **SHORTCUTS)
    p = jax.tree.map(np.asarray, drawn(config))
    block = jax.tree.map(lambda a: a[0], p["blocks"])

    def rms(x, scale=1.0):
        return scale * x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon)

    start = rms(p["token_embedding"]["embedding"][TOKENS])
    mix = block["shortcut"]
    x = mix["stream_scale"] * start + mix["embedding_scale"] * start
    h = rms(x, block["attention_norm"]["scale"])
    gate = 2 / (1 + np.exp(-h @ p["value_embedding"]["gate"]))  # width 32: it reads all features
    table = p["value_embedding"]["embedding"][TOKENS].reshape(4, 8, 2, 8)
    v = (h @ block["attention"]["v"]["kernel"]).reshape(4, 8, 2, 8) + gate[..., None] * table
    # A window of one key: each token attends to itself; query heads share their group's values.
    x = x + np.repeat(v, 2, axis=2).reshape(4, 8, 32) @ block["attention"]["o"]["kernel"]
    h = rms(x, block["mlp_norm"]["scale"])
    mlp = {name: w["kernel"] for name, w in block["mlp"].items()}
    gated = h @ mlp["gate"]
    x = x + (gated / (1 + np.exp(-gated)) * (h @ mlp["up"])) @ mlp["down"]
    expected = rms(x, p["final_norm"]["scale"]) @ p["head"]["kernel"]
    np.testing.assert_allclose(logits_of(config, drawn(config)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [3, 4])
def test_scan_loop_remat_cache_and_pipeline_agree(strict, layers):
    config = modern_tiny(layers=layers, window=(3,) * (layers - 1) + (8,), **SHORTCUTS)
    params = drawn(config)
    whole = logits_of(config, params)
    for change in ({"scan_layers": True}, {"remat": "full"}):
        other = logits_of(dataclasses.replace(config, **change), params)
        np.testing.assert_allclose(whole, other, rtol=1e-4, atol=1e-4)
    model = Transformer(config)
    cache, parts = init_cache(config, 4, 8), []
    for part in (TOKENS[:, :5], TOKENS[:, 5:]):
        out = jax.jit(lambda p, t, c: features(model, p, t, cache=c))(params, part, cache)
        cache = out.cache
        parts.append(head(model, params, out.final.reshape(-1, 32)).reshape(4, -1, 64))
    np.testing.assert_allclose(whole, jnp.concatenate(parts, axis=1), rtol=1e-4, atol=1e-4)
    if layers == 4:
        mesh = make_mesh(data=1, pipeline=2, devices=jax.devices()[:2])
        with jax.set_mesh(mesh), jax.numpy_rank_promotion("allow"):
            piped = logits_of(config, params, pipeline=lambda stage: pipeline(stage, 2))
        np.testing.assert_allclose(whole, piped, rtol=1e-4, atol=1e-4)


def test_what_starts_at_nothing_changes_nothing():
    plain = modern_tiny()
    config = dataclasses.replace(plain, embedding_shortcut=0.0)
    params = jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS)["params"]
    bare = {**params, "blocks": {k: v for k, v in params["blocks"].items() if k != "shortcut"}}
    np.testing.assert_array_equal(logits_of(config, params), logits_of(plain, bare))


def test_counts_name_what_is_there():
    plain, config = modern_tiny(layers=3), modern_tiny(layers=3, **SHORTCUTS)
    assert config.value_layers == (0, 2)
    tables = 64 * 2 * 4 * 8 + 32 * 2 * 4
    assert parameter_count(config) == parameter_count(plain) + 3 * 2 + tables
    assert flops_per_token(config, 8) == flops_per_token(plain, 8) + 2 * 2 * 32 * 4


def test_adamw_takes_what_is_no_matrix_of_a_block():
    config = modern_tiny(**SHORTCUTS)
    params = abstract_params(config)
    tx = build(Muon(), Constant(), 10, params)
    state = jax.eval_shape(tx.init, params)
    parts = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "inner_states")))
    paths = {
        name: [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(part)]
        for name, part in parts.inner_states.items()
    }
    for word in ("shortcut", "value_embedding"):
        assert any(word in path for path in paths["adam"])
        assert not any(word in path for path in paths["matrix"])


@pytest.mark.parametrize("name", SHORTCUTS)
def test_hugging_face_refuses_by_name(name):
    with pytest.raises(ValueError, match=f"cannot hold .*{name}"):
        write_config(llama_tiny(**{name: SHORTCUTS[name]}))
    write_config(llama_tiny(layer_drop=0.5, token_drop=0.5))  # no part of what is computed


@pytest.mark.parametrize("scan", [False, True])
def test_without_a_key_nothing_is_left_out(strict, scan):
    config = modern_tiny(layers=3, scan_layers=scan, layer_drop=0.5, token_drop=0.5)
    model, params = Transformer(config), drawn(config)
    plain = dataclasses.replace(config, layer_drop=0.0, token_drop=0.0)
    np.testing.assert_array_equal(logits_of(config, params), logits_of(plain, params))

    @jax.jit
    def drop(key):
        return features(model, params, TOKENS, dropout_key=key).final

    one, same, other = drop(jax.random.key(0)), drop(jax.random.key(0)), drop(jax.random.key(1))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)


def test_a_block_that_is_left_out_is_the_identity(strict):
    """With a chance near 0 the last block goes, and its neighbours' gradients stay finite."""
    config = modern_tiny(layers=1, layer_drop=0.999)
    model, params = Transformer(config), drawn(config)

    @jax.jit
    def hidden(params, key):
        return features(model, params, TOKENS, dropout_key=key, capture=("hidden",)).hidden

    before, after = hidden(params, jax.random.key(0))
    np.testing.assert_array_equal(before, after)
    grads = jax.grad(lambda p: hidden(p, jax.random.key(0)).sum())(params)
    assert float(jnp.abs(grads["blocks"]["mlp"]["up"]["kernel"]).max()) == 0
    assert float(jnp.abs(grads["token_embedding"]["embedding"]).max()) > 0


@pytest.mark.parametrize("scan", [False, True])
def test_tokens_pass_by_the_middle_alone_and_stay_causal(strict, scan):
    config = modern_tiny(layers=3, scan_layers=scan, token_drop=0.5, embedding_shortcut=0.1)
    model, params = Transformer(config), drawn(config)

    @jax.jit
    def run(tokens):
        out = features(model, params, tokens, dropout_key=jax.random.key(3), capture=("hidden",))
        return out.hidden, out.final

    hidden, final = run(TOKENS)
    moved = (hidden[1:] != hidden[:-1]).any(-1).sum(-1)  # [layer, row]
    assert moved.tolist() == [[8] * 4, [kept_tokens(8, 0.5)] * 4, [8] * 4]
    _, other = run(TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 64))
    np.testing.assert_array_equal(final[:, :5], other[:, :5])
    assert not np.allclose(final[:, 5:], other[:, 5:])


def test_left_out_work_is_not_counted():
    config = modern_tiny(layers=4)
    for change in ({"layer_drop": 0.4}, {"token_drop": 0.5}):
        dropped = dataclasses.replace(config, **change)
        assert training_flops_per_token(dropped, 8) < training_flops_per_token(config, 8)
        assert flops_per_token(dropped, 8) == flops_per_token(config, 8)
    assert survival(4, 0.4).mean() == np.float32(0.75)


def test_what_does_not_fit_is_refused():
    key = jax.random.key(0)
    for config, words in (
        (modern_tiny(layers=2, token_drop=0.5), "at least 3 layers"),
        (modern_tiny(layers=3, token_drop=0.5, window=4), "no window"),
    ):
        with pytest.raises(ValueError, match=words):
            features(Transformer(config), drawn(config), TOKENS, dropout_key=key)
    config = modern_tiny(layer_drop=0.5)
    with pytest.raises(ValueError, match="no attention to capture"):
        features(
            Transformer(config), drawn(config), TOKENS, capture=("attention",), dropout_key=key
        )
    with pytest.raises(ValueError, match=r"layer_drop is 1\.0"):
        modern_tiny(layer_drop=1.0)
