"""The Transformer: causality, one set of parameters for every way to run it, cache, generation."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import dot_product_attention
from model.cache import init_cache
from model.config import TransformerConfig
from model.flops import abstract_params, flops_per_token
from model.generate import Sampling, _generate, generate, sample
from model.positions import rotate, rotation
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.shortcuts import unit_rms
from model.transformer import Transformer, features, head
from tests import compiled

CONFIGS = {
    "gpt2": gpt2_tiny(dropout=0.0),
    "llama": llama_tiny(),
    "modern": modern_tiny(zero_init_projections=False),
    "windows": modern_tiny(zero_init_projections=False, window=(3, 6)),
}
UNSCALED = modern_tiny(zero_init_projections=False, norm_scale=False)
KEY = jax.random.key(3)
TOKENS = jax.random.randint(jax.random.key(7), (3, 12), 0, 64)


def made(config, seed=0):
    """A model with every parameter redrawn at a visible scale."""
    model = Transformer(config)
    params = compiled.initial(model, jax.random.key(seed), TOKENS[:1, :2])
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    redrawn = [0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return model, jax.tree.unflatten(structure, redrawn)


def logits_of(model, params, tokens=TOKENS, **arguments):
    return compiled.logits_of(model, params, tokens, **arguments)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_sees_a_later_one(strict, name):
    model, params = made(CONFIGS[name])
    changed = TOKENS.at[:, 8].set((TOKENS[:, 8] + 1) % 64)
    before, after = logits_of(model, params), logits_of(model, params, changed)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8] - after[:, 8]).max() > 1e-3


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norms_without_scales_are_those_whose_scales_are_one(strict, norm):
    config = dataclasses.replace(UNSCALED, norm=norm, biases=norm == "layernorm")
    model, params = made(config)
    plain = dataclasses.replace(config, norm_scale=True)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    assert not [path for path in flat if path.endswith("scale")]
    shapes = flax.traverse_util.flatten_dict(abstract_params(plain), sep="/")
    whole = {path: flat.get(path, jnp.ones(leaf.shape)) for path, leaf in shapes.items()}
    added = set(shapes) - set(flat)
    expected = ("blocks/attention_norm", "blocks/mlp_norm", "final_norm")
    expected += ("blocks/attention/q_norm", "blocks/attention/k_norm")
    assert added == {f"{path}/scale" for path in expected}
    same = logits_of(Transformer(plain), flax.traverse_util.unflatten_dict(whole, sep="/"))
    np.testing.assert_allclose(logits_of(model, params), same, rtol=1e-5, atol=1e-5)


def test_norms_of_queries_and_keys_without_scales_may_stand_after_positions():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(2, 5, 4, 8)), jnp.float32)
    turn = rotation(jnp.arange(5)[None], 8, 100.0)
    before, after = rotate(unit_rms(x, 1e-3), turn), unit_rms(rotate(x, turn), 1e-3)
    np.testing.assert_allclose(before, after, atol=1e-6)


def test_a_window_hides_what_lies_before_it():
    model, params = made(modern_tiny(window=3, layers=1, zero_init_projections=False))
    changed = TOKENS.at[:, 2].set((TOKENS[:, 2] + 1) % 64)
    before, after = logits_of(model, params), logits_of(model, params, changed)
    differs = np.abs(before - after).max(axis=(0, 2)) > 1e-4
    assert differs.tolist() == [False] * 2 + [True] * 3 + [False] * 7


@pytest.mark.parametrize(
    ("name", "remat"),
    [("gpt2", "none"), ("llama", "full"), ("modern", "dots"), ("windows", "none")],
)
def test_scan_and_remat_change_nothing(strict, name, remat):
    model, params = made(CONFIGS[name])
    other = Transformer(dataclasses.replace(CONFIGS[name], scan_layers=True, remat=remat))

    def loss(params, model):
        return jnp.square(logits_of(model, params)).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    one, two = value_and_grad(params, model), value_and_grad(params, other)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(two[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(a).max()) + 1e-6)


def test_both_ways_start_from_the_same_parameters():
    for name, config in CONFIGS.items():
        scanned = dataclasses.replace(config, scan_layers=True)
        trees = [compiled.initial(Transformer(c), KEY, TOKENS) for c in (config, scanned)]
        same = jax.tree.map(lambda a, b: bool((a == b).all()), *trees)
        assert all(jax.tree.leaves(same)), name


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_equal_uncached_ones(strict, name):
    """Read in pieces of 5, 1, 1 and 5 tokens; the weights' scale makes differences visible."""
    model, params = made(CONFIGS[name])
    expected = logits_of(model, params)
    cache, found = init_cache(model.config, 3, 16), []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
        out = compiled.features_of(model, params, TOKENS[:, start:end], cache)
        cache = out.cache
        found.append(head(model, params, out.final.reshape(-1, 32)).reshape(3, end - start, -1))
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-5, rtol=1e-5)
    assert cache["length"].tolist() == [12] * 3


def test_rows_of_the_cache_have_lengths_of_their_own():
    model, params = made(CONFIGS["llama"])
    cache = init_cache(model.config, 3, 16)
    out = compiled.features_of(model, params, TOKENS[:, :8], cache)
    lengths = jnp.array([8, 3, 5])
    token = TOKENS[:, 9:10]
    out = compiled.features_of(model, params, token, {**out.cache, "length": lengths})
    for row, length in enumerate(lengths.tolist()):
        alone = TOKENS[row : row + 1].at[0, length].set(token[row, 0])  # what follows is unseen
        expected = compiled.features_of(model, params, alone).final[0, length]
        np.testing.assert_allclose(out.final[row, 0], expected, atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    model, params = made(CONFIGS["gpt2"])
    segments = jnp.array([[0] * 5 + [1] * 7] * 3)
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
    packed = logits_of(model, params, positions_BT=positions, segments_BT=segments)
    np.testing.assert_allclose(packed[:, :5], logits_of(model, params, TOKENS[:, :5]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], logits_of(model, params, TOKENS[:, 5:]), atol=1e-5)


def test_attention_against_an_independent_formula():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 6, n, 4)) for i, n in enumerate((4, 2, 2)))
    found = dot_product_attention(q, k, v)
    for b, t, h in np.ndindex(2, 6, 4):
        scores = np.array([q[b, t, h] @ k[b, s, h // 2] / 2.0 for s in range(t + 1)])
        weights = np.exp(scores - scores.max())
        expected = (weights / weights.sum()) @ np.asarray(v[b, : t + 1, h // 2])
        np.testing.assert_allclose(found[b, t, h], expected, atol=1e-5)


def test_attention_is_an_argument():
    calls = []

    def attention(*args):
        calls.append(1)
        return dot_product_attention(*args)

    config = CONFIGS["llama"]
    _, params = made(config)
    logits_of(Transformer(config, attention), params)
    assert len(calls) == config.layers


def test_captured_features_are_those_of_the_layers():
    model, params = made(CONFIGS["llama"])
    out = features(model, params, TOKENS, capture=("hidden", "attention"))
    assert out.hidden.shape == (3, 3, 12, 32)
    np.testing.assert_array_equal(out.hidden[0], params["token_embedding"]["embedding"][TOKENS])
    assert {n: a.shape[3] for n, a in out.attention.items()} == {"q": 4, "k": 2, "v": 2}
    with pytest.raises(ValueError, match="hidden, attention"):
        features(model, params, TOKENS, capture=("heads",))


def test_dropout_needs_a_key_and_leaves_the_mean():
    model, params = made(gpt2_tiny(dropout=0.5))
    plain = features(model, params, TOKENS).final
    np.testing.assert_array_equal(plain, features(model, params, TOKENS).final)
    keys = jax.random.split(jax.random.key(0), 3)
    dropped = [features(model, params, TOKENS, dropout_key=k).final for k in (*keys[:2], keys[0])]
    assert np.abs(dropped[0] - dropped[1]).max() > 0.1
    np.testing.assert_array_equal(dropped[0], dropped[2])


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
    config = dataclasses.replace(CONFIGS["llama"], dtype="bfloat16")
    model, params = made(config)
    assert features(model, params, TOKENS).final.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact = logits_of(Transformer(CONFIGS["llama"]), params)
    assert np.abs(logits_of(model, params) - exact).max() < 0.05 * np.abs(exact).max()


def test_zero_initialised_projections_make_blocks_the_identity():
    model = Transformer(modern_tiny())
    params = model.init(jax.random.key(0), TOKENS)["params"]
    hidden = features(model, params, TOKENS, capture=("hidden",)).hidden
    np.testing.assert_array_equal(hidden[0], hidden[-1])


def test_softcap_bounds_logits():
    model, params = made(modern_tiny(logit_softcap=2.0))
    assert np.abs(logits_of(model, params)).max() <= 2.0


def test_flops_count_the_kernels():
    """Against the products in the program of one layer without attention scores."""
    config = llama_tiny(layers=1, tied_head=False)
    kernels = [a.size for a in jax.tree.leaves(abstract_params(config)["blocks"]) if a.ndim == 3]
    expected = 2 * (sum(kernels) + 32 * 64) + 4 * 32 * (8 + 1) / 2
    assert flops_per_token(config, 8) == expected


# Generation


@pytest.mark.parametrize(
    ("name", "positions", "longest"),
    [("llama", 64, 40), ("gpt2", 12, 6)],  # over several chunks; fewer positions than a chunk has
)
def test_greedy_generation_equals_the_argmax_of_full_passes(name, positions, longest):
    """Ragged prompts."""
    model, params = made(dataclasses.replace(CONFIGS[name], max_length=positions))
    prompts = [[5], [1, 2, 3], list(range(longest))]
    found = generate(
        model,
        params,
        prompts,
        key=jax.random.key(0),
        max_new_tokens=6,
        sampling=Sampling(temperature=0),
    ).new_tokens()
    for prompt, new in zip(prompts, found, strict=True):
        tokens = list(prompt)
        for token in new:
            padded = jnp.array([tokens + [0] * (longest + 6 - len(tokens))])  # one program
            assert token == int(logits_of(model, params, padded)[0, len(tokens) - 1].argmax())
            tokens.append(token)
        assert len(new) == 6


def test_rotary_positions_go_on_past_those_of_training():
    found = []
    for longest in (16, 64):
        model, params = made(dataclasses.replace(CONFIGS["llama"], max_length=longest))
        found.append(
            generate(
                model,
                params,
                [list(range(30))],
                key=jax.random.key(0),
                max_new_tokens=6,
                sampling=Sampling(temperature=0),
                slots=64,
            ).new_tokens()
        )
    assert found[0] == found[1]


def test_generation_compiles_once_for_all_prompt_lengths(compilations):
    model, params = made(CONFIGS["gpt2"])
    _generate.clear_cache()
    for length, new in ((1, 3), (7, 9), (20, 2)):
        generate(model, params, [[1] * length], key=jax.random.key(0), max_new_tokens=new)
    assert compilations["jit(_generate)"] == 1


def test_stop_tokens_end_a_row():
    model, params = made(CONFIGS["gpt2"])
    arguments = {"key": jax.random.key(1), "max_new_tokens": 20}
    free = generate(model, params, [[1], [2]], **arguments).new_tokens()
    stop = free[0][4]
    found = generate(model, params, [[1], [2]], stop_tokens=[stop], **arguments).new_tokens()
    for row, whole in zip(found, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 20
        assert row == whole[:end]


def test_top_k_and_top_p_keep_the_most_probable():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    keys = jax.random.split(jax.random.key(0), 200)

    def drawn(**settings):
        return {int(sample(logits, k, Sampling(**settings))[0]) for k in keys}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.75) == {1, 3}
    assert drawn(top_p=0.76) == {1, 2, 3}
    assert drawn(top_p=1e-6) == {1}
    assert drawn(temperature=0) == {1}


def test_temperature_shapes_the_distribution():
    logits = jnp.log(jnp.array([[0.2, 0.8]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.vmap(lambda k: sample(logits, k, Sampling(temperature=0.5))[0])
    assert abs(float(draw(keys).mean()) - 0.64 / 0.68) < 0.02


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[]], 3, "at least one token"),
        ([[1] * 30], 3, "need 33 cache slots; there are 32"),
        ([[64]], 3, "token id 64 is outside the vocabulary of 64"),
        ([[-1]], 3, "token id -1"),
        ([[1]], 0, "at least 1"),
    ],
)
def test_generation_refuses(prompts, new, message):
    model, params = made(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompts, key=jax.random.key(0), max_new_tokens=new)


# Config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 5}, "768 does not divide into 5 heads"),
        ({"kv_heads": 5}, "12 heads cannot share 5"),
        ({"activation": "tanh"}, "gelu, gelu_exact, relu_squared, swiglu"),
        ({"window": (1, 2)}, "2 entries for 12 layers"),
        ({"window": 0}, "at least itself"),
        ({"dropout": 1.0}, "below 1"),
        ({"layers": 0}, "at least 1"),
        ({"positions": "rotary", "head_width": 3}, "even head width"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**fields)


def test_a_sequence_longer_than_the_positions_is_refused():
    model, params = made(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="33 tokens do not fit the 32"):
        logits_of(model, params, jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(ValueError, match="64 slots is longer than the 32"):
        init_cache(model.config, 1, 64)


def test_parameters_of_another_config_are_named():
    _, params = made(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="hold no head/kernel"):
        logits_of(Transformer(dataclasses.replace(CONFIGS["gpt2"], tied_head=False)), params)
