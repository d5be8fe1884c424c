"""The encoder-decoder: what sees what, its cache, its packing, and how rules and meshes see it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.build import build_model
from model.cache import init_cache
from model.config import config_from_dict
from model.flops import abstract_params, flops_per_token, parameter_count
from model.grow import check_growth
from model.presets import encoder_decoder_tiny
from model.rules import leaf_paths, match_per_layer
from model.transformer import features, head

KEY = jax.random.key(0)
T, S = 6, 7
CONFIGS = {
    "rotary": encoder_decoder_tiny(dropout=0.0),
    "learned": encoder_decoder_tiny(
        dropout=0.0,
        positions="learned",
        norm="layernorm",
        biases=True,
        qk_norm=False,
        tied_source=False,
        tied_head=False,
        kv_heads=2,
        scan_layers=True,
    ),
}


def built(name="rotary", **changes):
    """A model whose every parameter is redrawn at a visible scale, and rows for it."""
    model = build_model(dataclasses.replace(CONFIGS[name], **changes))
    tokens, source = (
        jax.random.randint(jax.random.key(n), (2, length), 1, 64) for n, length in ((1, T), (2, S))
    )
    params = jax.jit(model.init)(KEY, tokens)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    drawn = [0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return model, jax.tree.unflatten(structure, drawn), tokens, source


@functools.cache
def whole(model):
    """The compiled features of a model."""
    return jax.jit(functools.partial(features, model))


def moved(run, row, place):
    """The positions of the output at which a change of one token shows."""
    other = row.at[:, place].set(row[:, place] % 63 + 1)
    return (np.abs(run(other) - run(row)).max(axis=(0, 2)) > 1e-6).tolist()


@pytest.mark.variants(1)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_target_is_causal_and_sees_all_of_the_source_but_its_padding(name, strict):
    model, params, tokens, source = built(name)
    lengths = jnp.array([[S - 2], [S - 2]])
    real = (jnp.arange(S)[None] < lengths).astype(jnp.int32)

    @jax.jit
    def run(tokens, source):
        return features(model, params, tokens, source=source, source_segments=real).final

    assert moved(lambda t: run(t, source), tokens, 3) == [False] * 3 + [True] * 3
    # The last source token shows at the first target token: the encoder is not causal.
    assert moved(lambda s: run(tokens, s), source, S - 3) == [True] * T
    assert moved(lambda s: run(tokens, s), source, S - 2) == [False] * T
    short = whole(model)(params, tokens, source=source[:, : S - 2]).final
    np.testing.assert_allclose(run(tokens, source), short, rtol=1e-4, atol=1e-5)


@pytest.mark.variants(1)
@pytest.mark.parametrize("name", CONFIGS)
def test_with_a_cache_tokens_may_come_one_by_one(name, strict):
    model, params, tokens, source = built(name)
    expected = whole(model)(params, tokens, source=source).final
    cache = init_cache(model.config, 2, T)
    first = whole(model)(params, tokens[:, :2], cache=cache, source=source)
    parts, cache = [first.final], first.cache
    step = whole(model)
    for place in range(2, T):
        out = step(params, tokens[:, place : place + 1], cache=cache)
        parts.append(out.final)
        cache = out.cache
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=1e-4, atol=1e-5)


def test_packed_pairs_are_as_pairs_apart(strict):
    model, params, tokens, source = built()
    apart = whole(model)(params, tokens, source=source).final

    def packed(row):
        return row.reshape(1, -1)

    def places(length):
        return jnp.tile(jnp.arange(length), 2)[None], jnp.repeat(jnp.array([[1, 2]]), length, 1)

    (positions, segments), (source_positions, source_segments) = places(T), places(S)
    both = whole(model)(
        params,
        packed(tokens),
        positions,
        segments,
        source=packed(source),
        source_segments=source_segments,
        source_positions=source_positions,
    ).final
    np.testing.assert_allclose(both.reshape(apart.shape), apart, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_parameter_counts_and_its_gradient_is_right():
    with jax.enable_x64(True):
        types = {"dtype": "float64", "parameter_dtype": "float64"}
        model, params, tokens, source = built("learned", **types)
        params = jax.tree.map(lambda a: a.astype(jnp.float64), params)

        @jax.jit
        def value(params):
            final = features(model, params, tokens, source=source).final
            return jnp.sin(head(model, params, final.reshape(2 * T, -1))).mean()

        gradient = jax.jit(jax.grad(value))(params)
        # A key bias moves all scores of a query alike, and the softmax takes that away.
        idle = {p for p in leaf_paths(params) if p.endswith("attention/k/bias")}
        for path, leaf in zip(leaf_paths(params), jax.tree.leaves(gradient), strict=True):
            assert (np.linalg.norm(leaf) > 1e-9) == (path not in idle), path
        keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(params))))
        way = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape, a.dtype), params)
        ahead, behind = (
            value(jax.tree.map(lambda p, w, e=e: p + e * w, params, way)) for e in (1e-5, -1e-5)
        )
        along = sum(jax.tree.leaves(jax.tree.map(lambda g, w: (g * w).sum(), gradient, way)))
        np.testing.assert_allclose((ahead - behind) / 2e-5, along, rtol=1e-6)


@pytest.mark.slow
def test_scan_loop_and_recomputation_are_one(strict):
    model, params, tokens, source = built()
    expected = features(model, params, tokens, source=source).final
    other = build_model(dataclasses.replace(model.config, scan_layers=True, remat="full"))
    found = features(other, params, tokens, source=source).final
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dropout_draws_by_its_key_and_on_both_sides(strict):
    model, params, tokens, source = built(dropout=0.5)

    def run(key):
        return whole(model)(params, tokens, source=source, dropout_key=key).final

    one, again, other = run(KEY), run(KEY), run(jax.random.key(9))
    assert (one == again).all()
    assert (one != other).any()


def test_rules_see_two_stacks_by_layer():
    params = abstract_params(CONFIGS["rotary"])
    rules = [("decoder/blocks/1/.*", "b"), ("blocks/0/cross_attention/.*", "c"), ("encoder", "e")]
    found = match_per_layer(rules, params, default="d")
    assert found["decoder"]["blocks"]["cross_attention"]["q"]["kernel"] == ("c", "b")
    assert found["decoder"]["blocks"]["mlp"]["up"]["kernel"] == ("d", "b")
    assert found["encoder"]["blocks"]["mlp"]["up"]["kernel"] == ("e", "e")
    assert found["token_embedding"]["embedding"] == "d"


def test_the_config_comes_back_from_json_and_counts_its_costs():
    config = CONFIGS["rotary"]
    assert config_from_dict(dataclasses.asdict(config)) == config
    D, L = config.width, config.layers
    matrices = 12 * D * D * (L + config.encoder_layers) + 4 * D * D * L
    vectors = parameter_count(config) - matrices - 64 * D
    assert 0 < vectors < 1000
    # Scores and values: causal half in the decoder, whole in the encoder and across.
    half = (10 + 1) / 2
    scores = 4 * D * (L * half + 10 * (config.encoder_layers + L))
    expected = 2 * (matrices + 64 * D) + scores
    assert flops_per_token(config, 10) == pytest.approx(expected)


def test_what_does_not_fit_is_refused():
    model, params, tokens, source = built("learned")
    with pytest.raises(ValueError, match="reads a source"):
        features(model, params, tokens)
    cache = {**init_cache(model.config, 2, T), "source_segments": jnp.ones((2, S), jnp.int32)}
    with pytest.raises(ValueError, match="leave it out"):
        features(model, params, tokens, cache=cache, source=source)
    with pytest.raises(ValueError, match="cannot capture hidden"):
        features(model, params, tokens, source=source, capture=("hidden",))
    with pytest.raises(ValueError, match="learned positions"):
        features(model, params, tokens, source=jnp.ones((2, 40), jnp.int32))
    with pytest.raises(ValueError, match="no window"):
        encoder_decoder_tiny(window=4)
    with pytest.raises(ValueError, match="encoder_layers is 0"):
        encoder_decoder_tiny(encoder_layers=0)
    with pytest.raises(ValueError, match="pipeline"):
        build_model(CONFIGS["rotary"], pipeline=lambda stage: stage)
    with pytest.raises(ValueError, match="does not grow"):
        check_growth(CONFIGS["rotary"], dataclasses.replace(CONFIGS["rotary"], layers=4))
