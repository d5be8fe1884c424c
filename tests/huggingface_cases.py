"""What the tests of `model.huggingface` share: configs, redrawn parameters, edited folders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from model import huggingface
from model.flops import abstract_params
from model.presets import gpt2_tiny, llama_tiny, modern_tiny

NANOCHAT = {"norm_scale": False, "embedding_norm": True, "zero_init_projections": False}
"""What nanochat's block has beside those of `modern_tiny`, as far as a format holds it."""

CONFIGS = {
    "gpt2": gpt2_tiny(),
    "gpt2 untied": gpt2_tiny(tied_head=False, ffn_width=80, dropout=0.0),
    "gpt2 exact gelu": gpt2_tiny(activation="gelu_exact", norm_epsilon=1e-3, init_std=0.01),
    "gpt2 squared relu": gpt2_tiny(activation="relu_squared", layers=1),
    "llama": llama_tiny(norm_epsilon=1e-6, max_length=77),
    "llama tied, wide heads": llama_tiny(tied_head=True, head_width=16, rotary_base=500.0),
    "llama biases, all heads": llama_tiny(biases=True, kv_heads=None, layers=3),
    "qwen3": llama_tiny(qk_norm=True, norm_epsilon=1e-6, rotary_base=500.0),
    "qwen3 tied, wide heads": llama_tiny(qk_norm=True, tied_head=True, head_width=16),
    "nanochat": modern_tiny(**NANOCHAT, kv_heads=2, norm_epsilon=1e-6, rotary_base=500.0),
    "nanochat tied, wide heads, no cap": modern_tiny(
        **NANOCHAT, tied_head=True, head_width=16, logit_softcap=None, activation="gelu"
    ),
}


def drawn(config, seed=0, std=0.3):
    """Every parameter redrawn, biases and norms too: at their usual start many are 0 or 1."""
    leaves, tree = jax.tree.flatten(abstract_params(config))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(0, std, leaf.shape), leaf.dtype) for leaf in leaves]
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def rewrite(folder, change):
    """Applies `change` to the dict of tensors in a folder."""
    tensors = dict(load_file(folder / "model.safetensors"))
    save_file(change(tensors), folder / "model.safetensors")


def reconfigure(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def save_drawn(folder, config, **options):
    """Saves a config with redrawn parameters and returns (folder, params)."""
    params = drawn(config)
    huggingface.save(folder, config, params, **options)
    return folder, params
