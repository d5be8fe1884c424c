"""Growth keeps the function where it says so, lets copies learn apart, and refuses the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.flops import abstract_params
from model.grow import check_growth, grow, keeps_function, layer_sources
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.transformer import Transformer

TOKENS = jax.random.randint(jax.random.key(1), (2, 8), 0, 64)
# The shape of stories260K, whose head is tied: 8 query heads over 4 key/value heads.
STORIES = llama_tiny(width=64, heads=8, kv_heads=4, ffn_width=172, tied_head=True)
SHORTCUTS = {"embedding_norm": True, "embedding_shortcut": 0.1, "value_embeddings": True}
MODERN = modern_tiny(layers=2, **SHORTCUTS)
GPT2 = gpt2_tiny(dropout=0.0)

GROWTHS = {
    "twice as wide and deep": (STORIES, {"layers": 4, "width": 128, "heads": 16, "kv_heads": 8}),
    "all of GPT-2": (
        GPT2,
        {"layers": 5, "width": 96, "heads": 12, "ffn_width": 384, "tied_head": False},
    ),
    "shortcuts": (MODERN, {"layers": 6, "width": 64, "heads": 8, "ffn_width": 256}),
    "pairs of tokens": (modern_tiny(bigram_rows=32), {"layers": 4, "width": 64, "heads": 8}),
    "untied": (STORIES, {"tied_head": False}),
    "more hidden units": (MODERN, {"ffn_width": 200}),
    "more queries a group": (llama_tiny(), {"heads": 8}),
    "more groups of fewer queries": (llama_tiny(), {"heads": 6, "kv_heads": 6}),
    "narrow gate": (modern_tiny(width=16, heads=2, **SHORTCUTS), {"width": 64, "heads": 8}),
}


def larger(config, changes):
    return dataclasses.replace(
        config, head_width=config.head_width_, **{"ffn_width": config.ffn_width_} | changes
    )


def drawn(config):
    """Every parameter at a visible scale: what growth gets wrong shows."""
    leaves, structure = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    new = [0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


def logits_of(config, params):
    return jax.jit(lambda p: Transformer(config).apply({"params": p}, TOKENS))(params)


@pytest.mark.variants(4)
@pytest.mark.parametrize("name", GROWTHS)
def test_the_function_is_kept(strict, name):
    config, changes = GROWTHS[name]
    to, params = larger(config, changes), drawn(config)
    new = grow(params, config, to, key=jax.random.key(2))
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), new)
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), abstract_params(to))
    old, new = logits_of(config, params), logits_of(to, new)
    assert float(jnp.abs(old).max()) > 0.5
    np.testing.assert_allclose(new, old, atol=1e-5 * float(jnp.abs(old).max()))


def test_copies_learn_apart():
    """Net2Net's point: equal shares would give the copies of a unit equal gradients for ever."""
    to = larger(STORIES, {"width": 128, "heads": 16, "kv_heads": 8, "ffn_width": 344})
    params = grow(drawn(STORIES), STORIES, to, key=jax.random.key(2))

    @jax.jit
    @jax.grad
    def gradient(params):
        return jax.nn.logsumexp(Transformer(to).apply({"params": params}, TOKENS)).sum()

    grads = gradient(params)
    up = grads["blocks"]["mlp"]["up"]["kernel"]
    table = grads["token_embedding"]["embedding"]
    for one, two in ((up[..., :172], up[..., 172:]), (table[:, :64], table[:, 64:])):
        assert float(jnp.abs(one - two).max()) > 0.05 * float(jnp.abs(one).max())


def test_what_new_layers_are_made_of():
    three = dataclasses.replace(GPT2, layers=3)
    seven = dataclasses.replace(GPT2, layers=7)
    params = drawn(three)
    for how, expected in (
        ("stack", [0, 1, 2, 0, 1, 2, 0]),
        ("interpolate", [0, 0, 0, 1, 1, 2, 2]),
        ("identity", [0, 0, 0, 1, 1, 2, 2]),
    ):
        assert layer_sources(three, seven, how).tolist() == expected
        assert keeps_function(three, seven, how) == (how == "identity")
        blocks = grow(params, three, seven, how, key=jax.random.key(0))["blocks"]
        q, down = blocks["attention"]["q"]["kernel"], blocks["mlp"]["down"]["kernel"]
        np.testing.assert_array_equal(q, params["blocks"]["attention"]["q"]["kernel"][expected,])
        silent = [float(jnp.abs(layer).max()) == 0 for layer in down]
        assert silent == ([True, True, False, True, False, True, False] if how == "identity"
                          else [False] * 7)  # fmt: skip
    same = grow(params, three, three, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (GPT2, {"width": 48}, "make it a multiple, such as 64"),
        (GPT2, {"width": 64, "head_width": 16}, "grow the number of heads, or set head_width=8"),
        (GPT2, {"activation": "relu_squared"}, "activation 'gelu' cannot become 'relu_squared'"),
        (GPT2, {"max_length": 64}, "max_length 32 cannot become 64"),
        (MODERN, {"tied_head": True}, "cannot become tied"),
        (modern_tiny(layers=4, **SHORTCUTS), {"layers": 6}, "grow to a multiple of 4 layers"),
        (
            modern_tiny(norm_scale=False, tied_head=True),
            {"width": 64, "heads": 8},
            "norms have none; untie the head",
        ),
        (MODERN, {"value_embeddings": False}, "value_embeddings True cannot become False"),
        (llama_tiny(), {"layers": 1}, "layers 2 cannot become 1"),
        (llama_tiny(heads=8), {"heads": 9, "kv_heads": 3}, "make it a divisor"),
        (llama_tiny(heads=8), {"heads": 6, "kv_heads": 3, "width": 64}, "models only grow"),
        (llama_tiny(heads=8), {"heads": 8, "kv_heads": 4}, None),
        (llama_tiny(), {"heads": 2, "kv_heads": 2}, "models only grow"),
    ],
)  # fmt: skip
def test_what_does_not_grow_is_refused(config, changes, words):
    to = dataclasses.replace(config, **{"head_width": config.head_width_} | changes)
    if words is None:
        check_growth(config, to)
        return
    with pytest.raises(ValueError, match=words):
        check_growth(config, to)
