"""Masks of whole models: rules, layers, all layers together, rewinding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.pruning.mask_trees import (
    all_kept,
    block_kernels,
    by_layer,
    flat,
    leaves_at,
    masked,
    masks_from,
    nested,
    rewind,
    targets_of,
    together,
    zero_counts,
)
from compress.pruning.masks import blocks, magnitude, n_of_m
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.rules import leaf_paths
from model.transformer import Transformer


def params_of(config, seed=0):
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]
    draw = np.random.default_rng(seed)
    normal = lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), leaf.dtype)
    return jax.tree.map(normal, shapes)


PARAMS = params_of(gpt2_tiny())
SCORES = jax.tree.map(magnitude, PARAMS)
UP = "blocks/mlp/up/kernel"


@pytest.mark.parametrize("preset", [gpt2_tiny, llama_tiny, modern_tiny])
def test_block_kernels_and_nothing_else(strict, preset):
    params = params_of(preset())
    masks = masks_from(jax.tree.map(magnitude, params), block_kernels(0.7))
    expected = {p for p in leaf_paths(params) if p.startswith("blocks/") and p.endswith("kernel")}
    assert set(flat(masks)) == expected
    assert len(expected) == (7 if preset is llama_tiny else 6)
    for path, mask in flat(masks).items():
        w = leaves_at(params, {path: None})[path]
        zeros = (~mask).sum(axis=(1, 2))
        assert zeros.tolist() == [int(0.7 * w[0].size + 0.5)] * 2, path
        for layer in range(2):  # the lowest of this layer
            cut = np.sort(np.abs(w[layer]).ravel())[int(zeros[layer])]
            np.testing.assert_array_equal(mask[layer], np.abs(w[layer]) >= cut)
    pruned = masked(params, masks)
    assert int((flat(pruned)["token_embedding/embedding"] == 0).sum()) == 0
    assert jax.tree.structure(pruned) == jax.tree.structure(params)


def test_rules_by_layer_and_parameter(strict):
    rules = [("blocks/1/mlp/up/kernel", 0.9), ("mlp/up/kernel", 0.5), ("token_embedding", 0.25)]
    masks = masks_from(SCORES, rules)
    assert zero_counts(masks)["token_embedding/embedding"] == (512, 2048)
    assert (~flat(masks)[UP]).sum(axis=(1, 2)).tolist() == [2048, 3686]
    assert set(flat(masks)) == {UP, "token_embedding/embedding"}


def test_together_zeros_are_as_many_and_the_lowest_of_all(strict):
    params = jax.tree.map(lambda w: w, PARAMS)
    params["blocks"]["mlp"]["up"]["kernel"] *= jnp.array([1.0, 3.0]).reshape(2, 1, 1)
    scores = jax.tree.map(magnitude, params)
    rules = [("blocks/0/attention/o/kernel", 0.0), *block_kernels(0.6)]
    masks = flat(jax.jit(lambda s: masks_from(s, rules, together))(scores))
    targets = targets_of(rules, params)
    wanted = sum(
        int(np.floor(float(s) * score[0].size + 0.5))
        for path, score in leaves_at(scores, targets).items()
        for s in targets[path]
    )
    assert sum(int((~m).sum()) for m in masks.values()) == wanted
    assert masks["blocks/attention/o/kernel"][0].all()
    pool = {p: np.array(leaves_at(scores, targets)[p]) for p in targets}
    pool["blocks/attention/o/kernel"][0] = np.inf
    cut = np.sort(np.concatenate([p.ravel() for p in pool.values()]))[wanted]
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, pool[path] >= cut)
    by_one = (~masks[UP]).sum(axis=(1, 2))
    assert int(by_one[0]) > 1.5 * int(by_one[1])  # and not spread evenly, as by layer


@pytest.mark.parametrize("pattern", [n_of_m(4), blocks(4, 8)], ids=["2:4", "blocks"])
def test_patterns_hold_in_every_layer(pattern):
    masks = flat(masks_from(SCORES, block_kernels(0.5), by_layer(pattern)))
    for path, mask in masks.items():
        for layer in range(2):
            own = jax.jit(pattern)(leaves_at(SCORES, {path: None})[path][layer], 0.5)
            np.testing.assert_array_equal(mask[layer], own)
            assert int(own.sum()) == own.size // 2


def test_flat_and_nested_are_inverse():
    masks = all_kept(PARAMS, targets_of(block_kernels(0.5), PARAMS))
    assert jax.tree.structure(nested(flat(masks))) == jax.tree.structure(masks)


def test_rewind_takes_the_start_and_the_masks_of_the_end():
    initial = params_of(gpt2_tiny(), seed=5)
    masks = masks_from(SCORES, block_kernels(0.8))
    ticket = rewind(initial, masks)
    for path, w in leaves_at(ticket, dict.fromkeys(leaf_paths(ticket))).items():
        start = leaves_at(initial, {path: None})[path]
        mask = flat(masks).get(path, jnp.ones(w.shape, bool))
        np.testing.assert_array_equal(w, np.where(mask, start, 0))


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="leaves no weight"):
        targets_of(block_kernels(1.0), PARAMS)
    with pytest.raises(ValueError, match=r"no parameter matches 'blocks/\.\*/kernle'"):
        targets_of([("blocks/.*/kernle", 0.5)], PARAMS)
    with pytest.raises(ValueError, match="prune nothing"):
        targets_of(block_kernels(0.0), PARAMS)
    bad = jax.tree.map(lambda w: w.at[(0,) * w.ndim].set(jnp.nan), PARAMS)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        targets_of(block_kernels(0.5), bad)
    with pytest.raises(ValueError, match="only floating-point"):
        targets_of([("head", 0.5)], {"head": jnp.arange(3)})
    with pytest.raises(ValueError, match="no parameter at head/kernel"):
        masked(PARAMS, {"head": {"kernel": jnp.ones(3, bool)}})
    with pytest.raises(ValueError, match="groups along the contraction axis of 7 do not divide"):
        masks_from(SCORES, block_kernels(0.5), by_layer(n_of_m(7)))
