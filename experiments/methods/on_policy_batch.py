"""On-policy distillation: the student writes, the teacher says what it thinks of every token.

    loop (here, on the host)                      step (train.step, unchanged)
    prompts of the data -> student's text  ->     teacher in `frozen` reads it, loss on what is new

A student that learns from its teacher's or the data's text meets, once it writes, contexts that it
never saw; here it learns in its own (GKD, Agarwal et al. 2023, arXiv:2306.13649; with the reverse
divergence as in MiniLLM, Gu et al. 2023, arXiv:2306.08543, without the part of its gradient that
goes through the sampling).

Shapes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.distillation.logits import check_vocabularies, reverse_kl
from experiments.methods.distill_terms import TEACHER, logits_term, reads
from model.generate import Sampling, generate
from model.transformer import Transformer
from train.plugs import Batch, LossTerm, Metrics, PyTree, State, merge

Step = Callable[[State, PyTree, Batch], tuple[State, Metrics]]

# Folded into the run's key for the draws of this loop, so that they are none of the step's.
_OWN_DRAWS = 0x0509


@dataclass(frozen=True)
class OnPolicy:
    """How the student's text is made.

    Attributes:
      share: probability that a batch is the student's text and not the data's (GKD's lambda).
      prompt_length: tokens of the data that the student continues, at least 1.
      sampling: how it draws.
    """

    share: float = 1.0
    prompt_length: int = 16
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it is a probability, from 0 to 1")
        if self.prompt_length < 1:
            raise ValueError(f"prompt_length is {self.prompt_length}; it must be at least 1")


def on_policy_term(
    student: Transformer, teacher: Transformer, divergence: Any = reverse_kl, *, weight: Any = 1.0
) -> LossTerm:
    """The loss term for the step: the divergence from the teacher in `frozen`, token by token.

    Args:
      student: the model that trains.
      teacher: the model of `frozen["teacher"]`.
      divergence: from `compress.distillation.logits`.
      weight: a number or a function of the step.

    Raises:
      ValueError: another vocabulary.
    """
    check_vocabularies(student.config.vocabulary_size, teacher.config.vocabulary_size)
    return logits_term(teacher, reads(teacher), divergence, weight=weight)


def continued(
    model: Transformer,
    params: PyTree,
    batch: Mapping[str, Any],
    key: jax.Array,
    settings: OnPolicy,
) -> dict[str, np.ndarray]:
    """Returns the batch with all but each row's beginning written by the model.

    The weights are 1 where a target is new, and 0 in the prompt, so that the loss is on what the
    model has written alone. Segments and positions are left out: a row is one text.

    Args:
      model: the student.
      params: what it runs with.
      batch: of the data, "tokens" and "targets" [B, T].
      key: of the draws.
      settings: prompt length and sampling.

    Raises:
      ValueError: a prompt that leaves nothing to write.
    """
    tokens = np.asarray(batch["tokens"])
    T = tokens.shape[1]
    prompt = settings.prompt_length
    if prompt >= T:
        raise ValueError(
            f"a prompt of {prompt} tokens leaves nothing of the {T} to write; lower prompt_length"
        )
    written = generate(
        model,
        params,
        tokens[:, :prompt].tolist(),
        key=key,
        max_new_tokens=T - prompt,
        sampling=settings.sampling,
        slots=T,
    )
    text = np.asarray(written.tokens)
    # The last token has no target: T is all that learned positions may hold.
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, prompt - 1 : -1] = 1
    return {"tokens": text, "targets": np.roll(text, -1, axis=1), "weights": weights}


def batch_at(
    model: Transformer,
    state: State,
    frozen: PyTree,
    data: Callable[[int], Mapping[str, Any]],
    settings: OnPolicy,
) -> dict[str, Any]:
    """Returns the batch of the state's step: a function of state and data alone, so it resumes.

    Args:
      model: the student.
      state: before the step.
      frozen: as given to the step; what of the student does not train is merged from it.
      data: `step -> batch`.
      settings: see `OnPolicy`.
    """
    step = int(state.step)
    choose, draw = jax.random.split(
        jax.random.fold_in(jax.random.fold_in(state.rng, _OWN_DRAWS), step)
    )
    batch = dict(data(step))
    own = bool(jax.random.bernoulli(choose, settings.share))
    if own:
        params = merge(state.params, frozen.get("params", {}))
        batch = continued(model, params, batch, draw, settings)
    # One set of fields for both kinds, so that the step is compiled once.
    return {name: jnp.asarray(batch[name]) for name in ("tokens", "targets", "weights")}


def train_on_policy(
    step: Step,
    model: Transformer,
    state: State,
    frozen: PyTree,
    data: Callable[[int], Mapping[str, Any]],
    *,
    until: int,
    settings: OnPolicy,
    report: Callable[[int, Metrics], None] = lambda number, metrics: None,
) -> State:
    """Trains up to step `until`, each batch written or read anew.

    Args:
      step: compiled, from `train.step.make_train_step` with `on_policy_term` among its terms.
      model: the student.
      state: where to begin; given away to the step.
      frozen: with the teacher's parameters under "teacher".
      data: `step -> batch` of the data.
      until: the last step.
      settings: see `OnPolicy`.
      report: called with the number of each step that is done, and its metrics.

    Returns:
      The last state.

    Raises:
      ValueError: no teacher in `frozen`, or a prompt that leaves nothing to write.
    """
    if TEACHER not in frozen:
        raise ValueError(f"there is no teacher: put its parameters into frozen[{TEACHER!r}]")
    while int(state.step) < until:
        before = int(state.step)
        state, metrics = step(state, frozen, batch_at(model, state, frozen, data, settings))
        if int(state.step) == before:  # too many steps were not finite: see train.step
            break
        report(before + 1, metrics)
    return state
