"""Evaluation over a whole split: every token counts once and alike, however it is cut."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.presets import modern_tiny
from model.transformer import Transformer
from train.corpus import Split
from train.data import evaluation_batches
from train.evaluate import evaluate
from train.losses import cross_entropy, z_loss
from train.plugs import State
from train.step import make_evaluation_step

MODEL = Transformer(modern_tiny(zero_init_projections=False))
T = 8


@pytest.fixture(scope="module")
def state():
    params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return State(jnp.int32(0), params, (), jax.random.key(0), {})


@pytest.fixture(scope="module")
def split():
    tokens = np.random.default_rng(0).integers(0, 64, 50).astype(np.uint16)
    return Split(tokens, np.array([0]), 120)


def losses_by_hand(params, tokens):
    """Of each window of T by itself, in float64: nats of every token but the first."""
    apply, nats = jax.jit(MODEL.apply), []
    for start in range(0, len(tokens) - 1, T):
        window = np.asarray(tokens[start : start + T + 1], np.int32)
        padded = np.pad(window[:-1], (0, T + 1 - len(window)))  # causal: nothing before sees it
        logits = np.asarray(apply({"params": params}, padded[None])[0], np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        nats += [-log_probabilities[i, target] for i, target in enumerate(window[1:])]
    return np.array(nats)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_mean_is_over_tokens_whatever_the_batches(state, split, batch_size):
    """49 targets: the last window is short, and of 7 windows in rows of 3 two are padding."""
    step = jax.jit(make_evaluation_step(MODEL, [cross_entropy(), z_loss(weight=0.1)]))
    batches = evaluation_batches(split, sequence_length=T, batch_size=batch_size)
    means = evaluate(step, state, {}, batches, split.bytes)
    nats = losses_by_hand(state.params, split.tokens)
    assert means["tokens"] == len(nats) == 49
    assert means["loss"] == means["cross_entropy"] == pytest.approx(nats.mean(), rel=1e-5)
    assert means["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / 120, rel=1e-5)
    assert means["z_loss"] > 0


class Sums:
    """A step whose results say when they are waited for."""

    def __init__(self):
        self.events = []

    def __call__(self, state, frozen, batch):
        self.events.append(("dispatch", batch))
        events = self.events

        class Total:
            def __array__(self, dtype=None, copy=None):
                events.append(("read", batch))
                return np.asarray(float(batch))

        return {"cross_entropy": {"total": Total(), "count": 2.0}}


def test_at_most_two_batches_are_in_flight(state):
    step = Sums()
    means = evaluate(step, state, {}, range(1, 6))
    assert means == {"loss": 1.5, "tokens": 10.0, "cross_entropy": 1.5}
    in_flight = [
        sum({"dispatch": 1, "read": -1}[what] for what, _ in step.events[: n + 1])
        for n in range(len(step.events))
    ]
    assert max(in_flight) == 2
    assert [batch for what, batch in step.events if what == "read"] == [1, 2, 3, 4, 5]


def test_what_cannot_be_reported_is_said(state):
    with pytest.raises(ValueError, match="there was no batch"):
        evaluate(Sums(), state, {}, [])
    step = lambda state, frozen, batch: {"z_loss": {"total": 1.0, "count": 1.0}}
    with pytest.raises(ValueError, match="the terms are z_loss"):
        evaluate(step, state, {}, [0])
