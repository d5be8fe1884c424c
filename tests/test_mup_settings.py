"""muP as a setting of a run: the base model stays as it is, others get its rates and scales."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.cli import parse
from experiments.pretrain import OPTIMIZERS as NAMED
from experiments.pretrain import PRESETS, SCHEDULES, Pretrain, settings_of
from experiments.runs.assemble import assemble, initial_params
from model.config import TransformerConfig
from model.presets import modern_tiny
from model.rules import match_per_layer
from model.transformer import Transformer
from train.mup import MuP, scale_init, with_factors
from train.optimizers import Adam, AdamW, Muon, build
from train.optimizers.hyperball import MuonH
from train.schedules import Constant, Linear
from train.settings import Phase, Settings, fingerprint, from_json, to_json

SMALL = modern_tiny(qk_norm=False, logit_softcap=None, zero_init_projections=False)
WIDE = dataclasses.replace(SMALL, width=128, heads=16)


def settings(model=WIDE, mup=MuP(base_width=32), optimizer=AdamW(learning_rate=0.01)):  # noqa: B008
    phase = Phase(10, model, 4, 8)
    return Settings((phase,), tokenizer="bytes", optimizer=optimizer, schedule=Constant(), mup=mup)


def test_settings_go_through_json_and_old_ones_have_none():
    mine = settings(mup=MuP(64, base_heads=4, depth_exponent=0.5))
    assert from_json(json.loads(json.dumps(to_json(mine)))) == mine
    old = to_json(settings(mup=None))
    del old["mup"]
    assert from_json(json.loads(json.dumps(old))) == settings(mup=None)
    assert fingerprint(mine) != fingerprint(settings())


def test_the_base_model_itself_is_left_as_it_is():
    same, plain = settings(SMALL), settings(SMALL, mup=None)
    params = [jax.jit(lambda s=s: initial_params(s, SMALL))() for s in (same, plain)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    grads = jax.tree.map(lambda p: jnp.cos(10 * p), params[0])
    updates = []
    for each in (same, plain):
        tx = assemble(each, SMALL).optimizer
        updates.append(tx.update(grads, tx.init(params[0]), params[0], value=1.0, grads=grads)[0])
    jax.tree.map(np.testing.assert_array_equal, *updates)


def test_a_wide_model_gets_the_scales_and_rates_of_its_base():
    given, plain = settings(), settings(mup=None)
    params = jax.jit(lambda: initial_params(given, WIDE))()
    as_they_are = jax.jit(lambda: initial_params(plain, WIDE))()
    scale = lambda name, at=lambda p: p: float(
        jnp.std(at(params)[name]["kernel"]) / jnp.std(at(as_they_are)[name]["kernel"])
    )
    assert scale("head") == pytest.approx(1 / 4)
    assert scale("up", lambda p: p["blocks"]["mlp"]) == pytest.approx(1 / 2)
    grads = jax.tree.map(jnp.ones_like, params)
    steps = []
    for each in (given, plain):
        each = dataclasses.replace(each, optimizer=Adam(learning_rate=0.01))
        tx = assemble(each, WIDE).optimizer
        steps.append(tx.update(grads, tx.init(params), params, value=1.0, grads=grads)[0])
    ratio = jax.tree.map(lambda a, b: float(jnp.mean(a / b)), *steps)
    assert ratio["head"]["kernel"] == pytest.approx(1 / 4)
    assert ratio["blocks"]["attention"]["k"]["kernel"] == pytest.approx(1 / 4)
    assert ratio["token_embedding"]["embedding"] == pytest.approx(1.0)


def test_rules_of_the_optimizers_own_are_multiplied_layer_by_layer():
    params = {
        "blocks": {"up": {"kernel": jnp.ones((3, 2, 2))}},
        "head": {"kernel": jnp.ones((2, 5))},
    }
    given = Adam(learning_rate_rules=(("blocks/1/.*", 10.0), ("head", 3.0)))
    made = with_factors(given, (("head/kernel", 0.5), ("blocks/.*/kernel", 0.25)), params)
    found = match_per_layer(made.learning_rate_rules, params)
    assert found == {
        "blocks": {"up": {"kernel": (0.25, 2.5, 0.25)}},
        "head": {"kernel": 1.5},
    }
    frozen = {"head": params["head"]}  # what does not train needs no factor
    rules = with_factors(Adam(), (("head/kernel", 0.5), ("blocks/.*/kernel", 0.25)), frozen)
    assert rules.learning_rate_rules == (("^head/kernel$", 0.5),)


def test_the_base_of_a_model():
    base = MuP(base_width=32).base_of(WIDE)
    assert (base.width, base.heads, base.head_width_, base.ffn_width_) == (32, 4, 8, 128)
    wider_heads = dataclasses.replace(WIDE, heads=4)
    base = MuP(base_width=32, base_heads=4, base_layers=1).base_of(wider_heads)
    assert (base.heads, base.head_width_, base.layers) == (4, 8, 1)


def test_refusals():
    with pytest.raises(ValueError, match=r"a base of width 24 has 0.75 heads and 93.75"):
        MuP(base_width=24).base_of(dataclasses.replace(WIDE, heads=4, ffn_width=500))
    with pytest.raises(ValueError, match="tied_head=False"):
        assemble(settings(dataclasses.replace(WIDE, tied_head=True)), WIDE_TIED)
    with pytest.raises(ValueError, match="of MuonH goes with the width is not known"):
        assemble(settings(optimizer=MuonH()), WIDE)
    with pytest.raises(ValueError, match="is not known"):
        assemble(settings(optimizer=Muon(consistent_rms=0.2)), WIDE)
    with pytest.raises(ValueError, match="base_width is 0"):
        MuP(base_width=0)


WIDE_TIED = dataclasses.replace(WIDE, tied_head=True)


def test_the_command_line_names_the_base():
    groups = {
        "model": ("modern_mini", PRESETS),
        "optimizer": ("muon", NAMED),
        "schedule": ("linear", SCHEDULES),
    }
    words = ["--model.width", "256", "--model.heads", "8", "--mup-base-width", "64"]
    made, _ = settings_of(parse(Pretrain, groups, words))
    assert made.mup == MuP(64)
    assert settings_of(parse(Pretrain, groups, []))[0].mup is None
    with pytest.raises(ValueError, match="give --mup-base-width"):
        settings_of(parse(Pretrain, groups, ["--mup-base-layers", "2"]))


# A chain of 32 words, each of which two others follow: learned within a few dozen steps.
WORDS, TIME, STEPS = 32, 16, 40
RATES = tuple(0.004 * 2.0**n for n in range(6))


def batches():
    rng = np.random.default_rng(0)
    follow = rng.permuted(np.tile(np.arange(WORDS), (2, 1)), axis=1)
    tokens = np.zeros((STEPS, 16, TIME + 1), np.int32)
    tokens[..., 0] = rng.integers(0, WORDS, tokens.shape[:2])
    for t in range(TIME):
        tokens[..., t + 1] = follow[rng.integers(0, 2, tokens.shape[:2]), tokens[..., t]]
    return jnp.asarray(tokens)


def final_losses(width, mup):
    """Mean loss of the last steps at each rate, all rates under one vmap."""
    config = TransformerConfig(
        vocabulary_size=WORDS,
        max_length=TIME,
        layers=1,
        width=width,
        heads=width // 8,
        tied_head=False,
        norm="rmsnorm",
        biases=False,
        positions="rotary",
        ffn_width=2 * width,
        init_std=0.1,
    )
    model, tokens = Transformer(config), batches()
    params = jax.jit(model.init)(jax.random.key(0), tokens[0, :, :-1])["params"]
    optimizer = Adam(learning_rate=1.0, b2=0.95)
    if mup is not None:
        rules = mup.rules(config, optimizer)
        params = scale_init(params, rules.init_rules)
        optimizer = with_factors(optimizer, rules.learning_rate_rules, params)
    tx = build(optimizer, Linear(), STEPS, params)

    def loss(params, batch):
        logits = model.apply({"params": params}, batch[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], -1)
        return -picked.mean()

    def run(rate):
        def step(carry, batch):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            updates = jax.tree.map(lambda u: rate * u, updates)  # Adam's step has no scale
            return (optax.apply_updates(params, updates), state), value

        _, losses = jax.lax.scan(step, (params, tx.init(params)), tokens)
        return losses[-5:].mean()

    return dict(zip(RATES, jax.jit(jax.vmap(run))(jnp.asarray(RATES)).tolist(), strict=True))


@pytest.mark.slow
def test_the_best_rate_holds_within_a_factor_of_two_over_four_widths():
    from experiments.ablate.rates import best_rate

    best = {}
    for name, mup in (("muP", MuP(base_width=16)), ("standard", None)):
        found = [best_rate(final_losses(width, mup)) for width in (16, 32, 64, 128)]
        assert all(RATES[0] < rate < RATES[-1] for rate in found)  # none lies beyond the grid
        best[name] = max(found) / min(found)
    assert best["muP"] < 2.0
    assert best["standard"] > 1.5 * best["muP"]
