"""The cache in 8 bits: its rounding, what that does to logits, its bytes, generation with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.quantization.kv_cache import Int8Slots, cache_bytes, int8_cache, quantize_slots
from model.cache import init_cache
from model.flops import abstract_params
from model.generate import Sampling, generate
from model.presets import gpt2_tiny, llama_tiny
from model.transformer import Transformer, features, head

CONFIGS = {
    "gpt2": gpt2_tiny(dropout=0.0, scan_layers=True),
    "llama": llama_tiny(scan_layers=False, window=5),
}


def drawn(config):
    leaves, structure = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    new = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


def test_no_number_is_off_by_more_than_half_a_scale(strict):
    sizes = jnp.array([1e-3, 1, 50, 0]).reshape(1, 1, 4, 1)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 8)) * sizes
    numbers, scales = quantize_slots(x)
    assert (numbers.dtype, scales.shape) == (jnp.int8, (2, 3, 4))
    back = Int8Slots(numbers, scales, "float32").astype(jnp.float32)
    assert (jnp.abs(back - x) <= 0.5001 * scales[..., None]).all()
    assert (jnp.abs(back).max(axis=-1) == jnp.abs(x).max(axis=-1)).mean() > 0.7
    assert (back[:, :, 3] == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_move_little(strict, name):
    """Prefill of 4 and 8 tokens one by one, the second row from another length."""
    config = CONFIGS[name]
    model, params = Transformer(config), drawn(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, config.vocabulary_size)
    read = jax.jit(lambda params, tokens, cache: features(model, params, tokens, cache=cache))

    def logits(make):
        cache = make(config, 2, 12)
        out = read(params, tokens[:, :4], cache)
        found = [head(model, params, out.final[:, -1])]
        for place in range(4, 12):
            out = read(params, tokens[:, place : place + 1], out.cache)
            found.append(head(model, params, out.final[:, -1]))
        return np.stack(found), out.cache

    exact, _ = logits(init_cache)
    rounded, cache = logits(int8_cache)
    assert cache["k"].values.dtype == jnp.int8
    assert cache["length"].tolist() == [12, 12]
    error = np.abs(rounded - exact).max() / exact.std()
    assert 1e-5 < error < 0.05


def test_a_cache_of_8_bits_is_little_more_than_a_quarter():
    config = gpt2_tiny(width=128, heads=2)  # heads of 64
    whole, small = (cache_bytes(make(config, 2, 32)) for make in (init_cache, int8_cache))
    assert small / whole == pytest.approx((64 + 4) / (4 * 64), rel=1e-3)
    cache = int8_cache(config, 2, 32)
    assert cache["k"].nbytes + cache["v"].nbytes + 8 == small
    assert cache["k"].shape == init_cache(config, 2, 32)["k"].shape


def test_generation_takes_a_cache(strict):
    config = CONFIGS["gpt2"]
    model, params = Transformer(config), drawn(config)
    settings = {"key": jax.random.key(0), "max_new_tokens": 6, "sampling": Sampling(0.0)}
    prompts = [[1, 2, 3], [4]]
    exact = generate(model, params, prompts, slots=16, **settings).new_tokens()
    small = generate(model, params, prompts, slots=16, cache=int8_cache, **settings).new_tokens()
    assert small == exact  # greedy; the gaps between logits are wider than the rounding


def test_learned_positions_end_here_too():
    with pytest.raises(ValueError, match="longer than the"):
        int8_cache(CONFIGS["gpt2"], 1, 10_000)
