"""On-policy distillation: what the student wrote, where the loss is, resume, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.methods.on_policy_batch import (
    OnPolicy,
    batch_at,
    continued,
    on_policy_term,
    train_on_policy,
)
from model.flops import abstract_params
from model.generate import Sampling
from model.presets import gpt2_tiny, modern_tiny
from model.transformer import Transformer
from tests.compiled import logits_of
from train.plugs import State
from train.step import init_state, make_train_step

STUDENT = Transformer(gpt2_tiny(dropout=0.0, layers=1))
TEACHER = Transformer(modern_tiny())
SETTINGS = OnPolicy(prompt_length=3)


def params_of(model, seed, scale=0.3):
    leaves, structure = jax.tree.flatten(abstract_params(model.config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [scale * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def data(step, time=8):
    draw = np.random.default_rng(step)
    tokens = draw.integers(0, 64, (4, time + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((4, time), np.float32),
        "segments": np.ones((4, time), np.int32),
    }


@pytest.mark.parametrize("time", [8, 32])  # 32 is all that the learned positions hold
def test_greedy_text_is_what_the_model_would_say_next(strict, time):
    params = params_of(STUDENT, 0)
    greedy = OnPolicy(prompt_length=3, sampling=Sampling(temperature=0))
    given = data(0, time)
    batch = continued(STUDENT, params, given, jax.random.key(0), greedy)
    assert np.array_equal(batch["tokens"][:, :3], given["tokens"][:, :3])
    assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert batch["tokens"].shape == given["tokens"].shape
    said = logits_of(STUDENT, params, jnp.asarray(batch["tokens"])).argmax(axis=-1)
    new = batch["weights"] > 0
    assert new.tolist() == [[False, False] + [True] * (time - 3) + [False]] * 4
    assert np.array_equal(np.asarray(said)[new], batch["targets"][new])
    assert not np.array_equal(batch["targets"][new], given["targets"][new])


OPTIMIZER = optax.adam(3e-2)
STEP = jax.jit(
    make_train_step(STUDENT, [on_policy_term(STUDENT, TEACHER)], OPTIMIZER, loss_chunk=10)
)


def start():
    return init_state(jax.random.key(5), params_of(STUDENT, 0, 0.1), OPTIMIZER)


FROZEN = {"teacher": params_of(TEACHER, 1)}


@pytest.mark.slow
def test_the_student_comes_closer_to_its_teacher_in_its_own_text(compilations):
    STEP.clear_cache()
    state = start()
    losses = []

    def note(number, metrics):
        losses.append(float(metrics["distil_logits"]))

    train_on_policy(STEP, STUDENT, state, FROZEN, data, until=40, settings=SETTINGS, report=note)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert compilations["jit(step)"] == 1


@pytest.mark.slow
def test_it_resumes_bitwise():
    state = start()
    mixed = OnPolicy(share=0.5, prompt_length=3)
    whole = train_on_policy(STEP, STUDENT, state, FROZEN, data, until=6, settings=mixed)
    half = train_on_policy(STEP, STUDENT, state, FROZEN, data, until=3, settings=mixed)
    again = State(*jax.device_get([half.step, half.params, half.optimizer]), half.rng, half.extra)
    again = train_on_policy(STEP, STUDENT, again, FROZEN, data, until=6, settings=mixed)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(again.params), strict=True):
        assert np.array_equal(a, b)


def test_the_share_chooses_between_the_students_text_and_the_datas():
    state = start()

    def own(share, step):
        at = State(jnp.int32(step), state.params, state.optimizer, state.rng, state.extra)
        settings = OnPolicy(share, prompt_length=3)
        batch = batch_at(STUDENT, at, FROZEN, data, settings)
        assert set(batch) == {"tokens", "targets", "weights"}
        return not np.array_equal(batch["tokens"], data(step)["tokens"])

    assert [own(0.0, step) for step in range(4)] == [False] * 4
    assert [own(1.0, step) for step in range(4)] == [True] * 4
    assert len({own(0.5, step) for step in range(8)}) == 2


def test_only_what_was_written_counts():
    """The loss of a step does not depend on how the targets of the prompt would score."""
    state = start()
    batch = batch_at(STUDENT, state, FROZEN, data, SETTINGS)
    _, metrics = STEP(state, FROZEN, batch)
    assert metrics["tokens"] == 4 * 5
    s, t = (
        m.apply({"params": p}, batch["tokens"])
        for m, p in ((STUDENT, state.params), (TEACHER, FROZEN["teacher"]))
    )
    log_q, log_p = (jax.nn.log_softmax(x, axis=-1)[:, 2:-1] for x in (s, t))
    expected = (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1).mean()
    assert metrics["distil_logits"] == pytest.approx(float(expected), rel=1e-4)


def test_bad_input():
    state = start()
    with pytest.raises(ValueError, match=r"frozen\['teacher'\]"):
        train_on_policy(STEP, STUDENT, state, {}, data, until=1, settings=SETTINGS)
    with pytest.raises(ValueError, match="prompt of 8 tokens leaves nothing of the 8"):
        continued(STUDENT, state.params, data(0), jax.random.key(0), OnPolicy(prompt_length=8))
    with pytest.raises(ValueError, match="vocabulary of 64 tokens and the student one of 65"):
        on_policy_term(Transformer(gpt2_tiny(vocabulary_size=65)), TEACHER)
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        OnPolicy(share=1.5)
    with pytest.raises(ValueError, match="prompt_length is 0"):
        OnPolicy(prompt_length=0)
