"""Ranges of the settings, and which parameters decay."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from train.optimizers import Muon
from train.optimizers.settings import DecayingSettings, OptimizerSettings, decay_mask


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rate": 0.0}, "learning_rate of DecayingSettings must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"learning_rate_rules": (("head", -1.0),)}, "factor of 'head'"),
        ({"learning_rate_rules": (("head", 1.0), ("k", float("nan")))}, "factor of 'k'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        DecayingSettings(**changes)


def test_a_new_optimizer_states_its_transformation():
    with pytest.raises(NotImplementedError):
        OptimizerSettings().transformation(lambda peak: lambda step: peak, {})


def test_stacked_biases_and_scales_are_no_matrices():
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = {
        "blocks": {
            "attention": {"q": {"kernel": shape(2, 3, 3), "bias": shape(2, 3)}},
            "attention_norm": {"scale": shape(2, 3), "bias": shape(2, 3)},
            "shortcut": shape(2),
        },
        "position_embedding": {"embedding": shape(5, 3)},
    }
    mask = decay_mask(DecayingSettings(), 0.1, params)
    assert mask == {
        "blocks": {
            "attention": {"q": {"kernel": True, "bias": False}},
            "attention_norm": {"scale": False, "bias": False},
            "shortcut": False,
        },
        "position_embedding": {"embedding": True},
    }
    assert decay_mask(DecayingSettings(), 0.0, params) is None
    none = dataclasses.replace(DecayingSettings(), decay_rules=())
    assert not any(jax.tree.leaves(decay_mask(none, 0.1, params)))


@pytest.mark.parametrize("start", [1.0, -3.0])
def test_momentum_starts_below_one(start):
    with pytest.raises(ValueError, match="momentum_start of Muon"):
        Muon(momentum_start=start, momentum_warmup_steps=3)
