"""Transfer over width and depth: activations move by as much in every model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import TransformerConfig
from model.rules import leaf_paths, match
from model.transformer import Transformer
from train.mup import MuP, scale_init, transfer
from train.optimizers import AdamW, Muon, build
from train.schedules import Constant

BASE = TransformerConfig(
    vocabulary_size=64,
    max_length=16,
    layers=2,
    width=32,
    heads=2,
    tied_head=False,
    norm="rmsnorm",
    biases=False,
    positions="rotary",
    init_std=0.1,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 17)), jnp.int32)


def movement(config, settings, rules=None, steps=4):
    """Root mean square of what a few steps change in the features that the head sees."""
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    if rules is not None:
        params = scale_init(params, rules.init_rules)
        settings = dataclasses.replace(settings, learning_rate_rules=rules.learning_rate_rules)
    tx = build(settings, Constant(), 100, params)

    def logits(params):
        return model.apply({"params": params}, TOKENS[:, :-1])

    def loss(params):
        picked = jax.nn.log_softmax(logits(params))
        return -jnp.take_along_axis(picked, TOKENS[:, 1:, None], -1).mean()

    def features(params):
        return model.apply({"params": params}, TOKENS[:, :-1], method="features").final

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return features(after) - features(params)

    return float(jnp.sqrt(jnp.square(run(params)).mean()))


def wider(width):
    return dataclasses.replace(BASE, width=width, heads=width // 16)


def deeper(layers):
    return dataclasses.replace(BASE, layers=layers)


OPTIMIZERS = {
    "elementwise": AdamW(learning_rate=1e-3, weight_decay=0.0, clip_norm=None),
    "spectral": Muon(
        learning_rate=5e-3, adam_learning_rate=1e-3, weight_decay=0.0, adam_weight_decay=0.0
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("matrices", OPTIMIZERS)
def test_features_move_by_as_much_at_every_width(matrices):
    settings = OPTIMIZERS[matrices]
    with_rules = [
        movement(wider(w), settings, transfer(wider(w), BASE, matrices=matrices))
        for w in (32, 64, 128, 256)
    ]
    assert max(with_rules) < 1.4 * min(with_rules)
    if matrices == "elementwise":  # orthogonal steps transfer over width by themselves
        assert movement(wider(256), settings) > 1.5 * with_rules[-1]


@pytest.mark.slow
@pytest.mark.parametrize("matrices", OPTIMIZERS)
def test_features_move_by_as_much_at_every_depth(matrices):
    settings = OPTIMIZERS[matrices]
    moved = [
        movement(deeper(n), settings, transfer(deeper(n), BASE, matrices=matrices))
        for n in (2, 4, 8, 16)
    ]
    assert max(moved) < 1.6 * min(moved)
    assert movement(deeper(16), settings) > 1.7 * moved[0]


def test_the_base_model_is_left_as_it_is():
    for matrices in OPTIMIZERS:
        rules = transfer(BASE, BASE, matrices=matrices)
        assert {factor for _, factor in (*rules.learning_rate_rules, *rules.init_rules)} == {1.0}


@pytest.mark.parametrize("biases", [False, True])
def test_factors_of_a_wide_and_deep_model(biases):
    """Table 8 of muP and table 1 of CompleteP, multipliers moved into the kernels."""
    base = dataclasses.replace(BASE, biases=biases, head_width=16)
    config = dataclasses.replace(base, width=128, heads=4, head_width=32, layers=8, ffn_width=256)
    model = Transformer(config)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rules = transfer(config, base)
    paths = leaf_paths(params)
    rates = dict(
        zip(paths, jax.tree.leaves(match(rules.learning_rate_rules, params, 1.0)), strict=True)
    )
    scales = dict(zip(paths, jax.tree.leaves(match(rules.init_rules, params, 1.0)), strict=True))
    assert rates["blocks/attention/k/kernel"] == pytest.approx(1 / 4)
    assert rates["blocks/attention/q/kernel"] == pytest.approx(1 / 4 / 2**0.5)
    assert rates["blocks/attention/o/kernel"] == pytest.approx(1 / 4 / 4)
    assert rates["blocks/mlp/down/kernel"] == pytest.approx(1 / 2 / 4)
    assert rates["head/kernel"] == pytest.approx(1 / 4)
    assert rates["token_embedding/embedding"] == 1.0
    assert scales["blocks/mlp/up/kernel"] == pytest.approx(1 / 2)
    # the model itself divides by the root of layers
    assert scales["blocks/mlp/down/kernel"] / 4**0.5 == pytest.approx(2**-0.5 / 4)
    if biases:
        assert rates["blocks/mlp/down/bias"] == pytest.approx(1 / 4)
    half = dict(transfer(config, base, depth_exponent=0.5).learning_rate_rules)
    assert half["blocks/.*"] == pytest.approx(1 / 2)


def test_wider_heads_under_norms_of_queries():
    """A norm undoes a factor of the kernel before it: its own scale has the factor."""
    base = dataclasses.replace(BASE, head_width=16, qk_norm=True, norm="rmsnorm")
    wide = dataclasses.replace(base, width=128, heads=4, head_width=64)
    rules = transfer(wide, base)
    for named in (dict(rules.init_rules), dict(rules.learning_rate_rules)):
        assert named["attention/q_norm/scale"] == pytest.approx(1 / 2)
    scales = dict(rules.init_rules)
    assert scales["attention/q/kernel"] == scales["blocks/.*/kernel"]
    with pytest.raises(ValueError, match="leave base_heads out"):
        transfer(*(dataclasses.replace(c, norm_scale=False) for c in (wide, base)))
    method = MuP(base_width=base.width, base_heads=base.heads)
    for optimizer in (AdamW(), Muon()):  # of Muon, its AdamW part has them
        rates = dict(method.rules(dataclasses.replace(wide, head_width=None), optimizer)[0])
        assert rates["mtp/.*/kernel"] == base.width / 128


def test_refusals():
    tied = dataclasses.replace(BASE, tied_head=True)
    with pytest.raises(ValueError, match="tied_head=False"):
        transfer(tied, BASE)
    with pytest.raises(ValueError, match="depth_exponent"):
        transfer(BASE, BASE, depth_exponent=2.0)
    with pytest.raises(ValueError, match="elementwise"):
        transfer(BASE, BASE, matrices="muon")
